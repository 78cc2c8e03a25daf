"""The bandwidth that a GPU's floor comes from: never less than the memory's own."""

import pytest

from isokern.autotune.measure_cuda import CudaBandwidth, peak_bandwidth

#: An H100's: 2619 MHz, 5120 bits.
H100 = {36: 2_619_000, 37: 5120}


class StandIn:
    """A driver that knows some attributes, and refuses others."""

    def __init__(self, known):
        self.known = known

    def cuDeviceGetAttribute(self, out, attribute, device):
        assert device == 3
        out._obj.value = self.known.get(attribute, 0)
        return 0 if attribute in self.known else 1


class Device(CudaBandwidth):
    """Without a GPU: what copies reach, one after another, and what the memory could."""

    def __init__(self, copied, peak):
        super().__init__()
        self.copied, self.peak, self.sizes = list(copied), peak, []

    def _peak(self):
        return self.peak

    def _copied(self, size):
        self.sizes.append(size)
        return self.copied.pop(0)


def test_the_memorys_bandwidth_follows_from_its_clock_and_width():
    assert peak_bandwidth(StandIn(H100), 3) == pytest.approx(3.352e12, rel=1e-3)


@pytest.mark.parametrize("known", [{}, {36: 2_619_000}, {36: 0, 37: 5120}, {36: -1, 37: 5120}])
def test_a_driver_that_does_not_tell_leaves_it_to_the_copies(known):
    assert peak_bandwidth(StandIn(known), 3) == 0.0


def test_a_slow_copy_makes_no_kernel_impossible():
    """Copies of half a GiB reached 2.43 TB/s on an H100 whose kernels moved 2.9."""
    assert Device([2.43e12], 3.35e12).of(1 << 30) == 3.35e12


def test_what_lies_in_the_cache_may_be_faster_than_the_memory():
    assert Device([7e12], 3.35e12).of(8 << 20) == 7e12


def test_it_is_measured_once_for_a_size_and_again_only_gets_larger():
    device = Device([1e12, 3e12, 2e12], 0.0)
    assert [device.of(5 << 20), device.of(6 << 20)] == [1e12, 1e12]
    assert [device.again(5 << 20), device.again(5 << 20), device.of(4 << 20)] == [3e12, 3e12, 3e12]
    assert device.sizes == [4 << 20] * 3
