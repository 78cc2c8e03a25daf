"""The registry: who implements an op, who may run, who is chosen and why. On a toy op without torch."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from isokern.cache import Store
from isokern.cache.found import Miss
from isokern.errors import (
    BackendDeclinedError,
    BackendFailedError,
    NoBackendError,
    PredicateError,
    RegistrationError,
    UnknownNameError,
)
from isokern.registry import Accepted, Backend, Config, FunctionBackend, OpSpec, Registry, RejectCode, Rejected, Rule
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.overrides import environment_overrides, use


@dataclass(frozen=True)
class Size:
    n: int
    device: str = "cpu"
    label: str = "toy"

    def key(self):
        return {"n": self.n}

    tuning_key = key


class Toy:
    """The smallest op: doubles an int."""

    def __init__(self, dispatcher):
        self.dispatcher = dispatcher

    def __call__(self, n, backend=None):
        return self.dispatcher.resolve(Size(n), backend).runner(n)


def toy_spec(name="toy"):
    nothing = lambda *_: None  # noqa: E731
    return OpSpec(
        name=name,
        contract_version=1,
        summary="doubles",
        reference_backend="slow",
        make_op=Toy,
        canonical=nothing,
        check_values=nothing,
        problem=lambda n, mode: Size(n),
        allocate=nothing,
        make_inputs=nothing,
        reference=nothing,
        judge=nothing,
        cases=dict,
        checks=list,
        error_inputs=list,
        tensors=(),
    )


class Slow(Backend):
    op, name, provenance, priority = "toy", "slow", "python", 0

    def check(self, problem):
        return Accepted()

    def bind(self, problem, config):
        return lambda n: ("slow", 2 * n)


class Fast(Slow):
    name, priority = "fast", 50

    def check(self, problem):
        return Accepted() if problem.n < 10 else Rejected(RejectCode.SHAPE, f"n < 10 only, given {problem.n}")

    def configs(self, problem):
        return (Config.of(tile=4), Config.of(tile=8))

    def bind(self, problem, config):
        return lambda n: (f"fast{config['tile']}", 2 * n)


class NoStore:
    def get(self, *args):
        return Miss("no entry")

    def neighbours(self, *args):
        return []

    def tables(self, environment):
        return ()

    def refresh(self):
        pass


@pytest.fixture
def registry(monkeypatch):
    for name in list(__import__("os").environ):
        if name.startswith("ISOKERN_BACKEND_"):
            monkeypatch.delenv(name)
    made = Registry(builtin_ops={}, load_plugins=False)
    made.register_op(toy_spec())
    made.use_store(NoStore())
    made.register_backend(Slow())
    made.register_backend(Fast())
    return made


class TestChoice:
    def test_the_highest_rank_that_accepts_runs(self, registry):
        assert registry.get("toy")(3) == ("fast4", 6)

    def test_a_declined_problem_goes_to_the_next_and_says_so(self, registry):
        decision = registry.dispatcher("toy").decide(Size(12))
        assert (decision.backend, decision.rule) == ("slow", Rule.REFERENCE)
        assert decision.outcome_of("fast") == Rejected(RejectCode.SHAPE, "n < 10 only, given 12")
        assert decision.problem == {"n": 12}

    def test_order_of_precedence(self, registry, monkeypatch):
        dispatcher = registry.dispatcher("toy")
        assert dispatcher.decide(Size(1)).rule is Rule.HEURISTIC
        monkeypatch.setenv("ISOKERN_BACKEND_TOY", "slow")
        assert dispatcher.decide(Size(1)).rule is Rule.HEURISTIC, "the environment is read once"
        registry.refresh()
        assert dispatcher.decide(Size(1)).rule is Rule.ENVIRONMENT
        with use("toy", "slow"):
            assert dispatcher.decide(Size(1)).rule is Rule.CONTEXT
            decision = dispatcher.decide(Size(1), "fast")
            assert (decision.rule, decision.backend) == (Rule.ARGUMENT, "fast")
        assert dispatcher.decide(Size(1)).rule is Rule.ENVIRONMENT

    def test_the_order_of_registration_does_not_matter(self, registry):
        other = Registry(builtin_ops={}, load_plugins=False)
        other.register_op(toy_spec())
        other.use_store(NoStore())
        for backend in (Fast(), Slow()):
            other.register_backend(backend)
        assert other.dispatcher("toy").decide(Size(1)) == registry.dispatcher("toy").decide(Size(1))

    def test_resolved_calls_are_remembered_until_a_backend_comes_or_goes(self, registry):
        op, dispatcher = registry.get("toy"), registry.dispatcher("toy")
        op(3)
        op(3)
        assert len(dispatcher.bound) == 1
        assert dispatcher.misses == {Size(3): 1}
        registry.unregister_backend("toy", "fast")
        assert op(3) == ("slow", 6)

    def test_resolved_calls_are_bounded(self, registry, monkeypatch):
        monkeypatch.setattr("isokern.registry.dispatch.MAX_BOUND", 5)
        op, dispatcher = registry.get("toy"), registry.dispatcher("toy")
        for n in range(20):
            op(n % 9)
        assert len(dispatcher.bound) <= 5

    def test_the_context_holds_per_thread(self, registry):
        seen = []
        with use("toy", "slow"):
            thread = threading.Thread(target=lambda: seen.append(registry.get("toy")(3)))
            thread.start()
            thread.join()
            assert registry.get("toy")(3)[0] == "slow"
        assert seen == [("fast4", 6)]


def test_a_contracts_version_is_known_without_loading_the_op(registry):
    assert registry.contract_version("toy") == 1
    own = Registry(load_plugins=False)
    for name in own.names():
        version = own.contract_version(name)
        assert not own._specs
        assert own.spec(name).contract_version == version == own.contract_version(name)


class TestErrors:
    @pytest.mark.parametrize("ask", ["get", "backends", "contract_version"])
    def test_unknown_op_names_near_ones(self, registry, ask):
        with pytest.raises(UnknownNameError, match="did you mean 'toy'") as caught:
            getattr(registry, ask)("tooy")
        assert caught.value.near == ("toy",)

    def test_unknown_backend_names_near_ones(self, registry):
        with pytest.raises(UnknownNameError, match="'fast'"):
            registry.get("toy")(1, backend="fats")

    def test_a_forced_backend_that_declines_raises_and_nothing_else_runs(self, registry):
        with pytest.raises(BackendDeclinedError, match="n < 10 only") as caught:
            registry.get("toy")(12, backend="fast")
        assert (caught.value.backend, caught.value.code) == ("fast", "shape")

    def test_no_backend_lists_every_reason(self, registry):
        registry.unregister_backend("toy", "slow")
        with pytest.raises(NoBackendError, match=r"fast: \[shape\] n < 10 only"):
            registry.get("toy")(12)

    def test_a_predicate_that_raises_is_a_bug_and_says_so(self, registry):
        class Broken(Slow):
            name, priority = "broken", 99

            def check(self, problem):
                raise ZeroDivisionError("oops")

        registry.register_backend(Broken())
        with pytest.raises(PredicateError, match="check\\(\\) of backend 'broken' raised ZeroDivisionError: oops"):
            registry.get("toy")(1)

    @pytest.mark.parametrize("answer", [True, None, "no"])
    def test_a_predicate_must_return_a_decision(self, registry, answer):
        class Vague(Slow):
            name, priority = "vague", 99

            def check(self, problem):
                return answer

        registry.register_backend(Vague())
        with pytest.raises(PredicateError, match="returned"):
            registry.get("toy")(1)

    def test_a_backend_that_fails_to_bind_is_one_typed_error(self, registry):
        class Broken(Slow):
            name, priority = "broken", 99

            def bind(self, problem, config):
                raise OSError("no compiler")

        registry.register_backend(Broken())
        with pytest.raises(BackendFailedError, match=r"bind failed: op 'toy', backend 'broken'.*OSError: no compiler"):
            registry.get("toy")(1)

    def test_a_missing_framework_is_a_rejection_and_nothing_is_imported(self, registry):
        class NeedsMoon(Slow):
            name, priority, requires = "moon", 99, ("moon_framework",)

        registry.register_backend(NeedsMoon())
        verdict = registry.dispatcher("toy").decide(Size(1)).outcome_of("moon")
        assert verdict == Rejected(RejectCode.NOT_INSTALLED, "needs moon_framework, which is not installed")

    def test_names_are_taken_once(self, registry):
        with pytest.raises(RegistrationError, match="already registered"):
            registry.register_backend(Fast())
        with pytest.raises(RegistrationError, match="already registered"):
            registry.register_op(toy_spec())
        registry.register_backend(Fast(), replace=True)

    def test_an_op_must_bring_everything(self):
        import dataclasses

        with pytest.raises(RegistrationError, match="lacks make_inputs"):
            dataclasses.replace(toy_spec(), make_inputs=None)


class TestThirdParties:
    def test_the_decorator_registers_a_function(self, registry):
        @registry.backend(op="toy", name="mine", priority=99, configs=[{"by": 2}, {"by": 3}])
        def mine(n, by):
            return ("mine", n * by)

        assert registry.get("toy")(5) == ("mine", 10)
        assert mine(5, by=3) == ("mine", 15), "the function itself stays usable"

    def test_a_changed_source_changes_the_fingerprint(self, tmp_path):
        source = tmp_path / "kernel.py"

        class FromFile(Slow):
            def sources(self):
                return (source,)

        source.write_text("v1")
        first = FromFile().fingerprint()
        assert first == FromFile().fingerprint()
        source.write_text("v2")
        assert FromFile().fingerprint() != first

    def test_entry_points_are_loaded_and_a_broken_one_is_reported(self, tmp_path, monkeypatch):
        dist = tmp_path / "thirdparty-1.0.dist-info"
        dist.mkdir()
        (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.0\n")
        (dist / "entry_points.txt").write_text("[isokern.backends]\ngood = tp_kernels:Good\nbad = tp_missing:Bad\n")
        (tmp_path / "tp_kernels.py").write_text(
            "from isokern.registry import Accepted, Backend\n"
            "class Good(Backend):\n"
            "    op, name, provenance, priority = 'toy', 'good', 'external', 99\n"
            "    def check(self, problem): return Accepted()\n"
            "    def bind(self, problem, config): return lambda n: ('good', 2 * n)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        made = Registry(builtin_ops={}, load_plugins=True)
        made.register_op(toy_spec())
        made.use_store(NoStore())
        with pytest.warns(UserWarning, match=r"plugin 'bad' .* failed to load: ModuleNotFoundError"):
            assert made.get("toy")(1) == ("good", 2)
        verdict = made.dispatcher("toy").decide(Size(1)).outcome_of("bad")
        assert verdict.code is RejectCode.NOT_INSTALLED
        assert "tp_missing" in verdict.reason

    @pytest.fixture
    def thirdparty(self, tmp_path, monkeypatch):
        """A registry where a distribution with this entry point and module is installed."""

        def install(target: str, code: str) -> Registry:
            dist = tmp_path / "thirdparty-1.0.dist-info"
            dist.mkdir()
            (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.0\n")
            (dist / "entry_points.txt").write_text(f"[isokern.backends]\nmine = {target}\n")
            (tmp_path / f"{target.partition(':')[0]}.py").write_text(code)
            monkeypatch.syspath_prepend(tmp_path)
            made = Registry(builtin_ops={}, load_plugins=True)
            made.register_op(toy_spec())
            made.use_store(NoStore())
            return made

        return install

    def test_an_entry_point_that_is_no_backend_is_reported_and_takes_nobody_along(self, thirdparty):
        made = thirdparty("tp_function:run", "def run(call): return call\n")
        with pytest.warns(UserWarning, match=r"'mine' .* failed to load: TypeError: expected a Backend class"):
            made.register_backend(Slow())
        assert made.get("toy")(1) == ("slow", 2)
        assert "TypeError" in made.dispatcher("toy").decide(Size(1)).outcome_of("mine").reason
        assert set(made.backends("toy")) == {"slow", "mine"}, "the second time as the first"

    def test_an_entry_point_may_be_a_module_that_registers_by_decorator(self, thirdparty, recwarn):
        code = (
            "import tp_registry\n"
            "@tp_registry.made.backend('toy', 'mine', provenance='external', priority=99)\n"
            "def mine(n): return ('mine', 2 * n)\n"
        )
        made = thirdparty("tp_decorated", code)
        sys.modules["tp_registry"] = SimpleNamespace(made=made)
        try:
            made.register_backend(Slow())
            assert made.get("toy")(1) == ("mine", 2)
        finally:
            del sys.modules["tp_registry"], sys.modules["tp_decorated"]
        assert [str(w.message) for w in recwarn] == []

    @pytest.mark.parametrize("missing", ["nosuchpackage.sub", "json.nosuch", "os.path.nosuch"])
    def test_a_module_inside_a_package_may_be_missing_with_or_without_it(self, registry, missing):
        registry.backend("toy", "needy", requires=(missing,), priority=99)(lambda n: n)
        assert registry.get("toy")(1) == ("fast4", 2)
        assert registry.dispatcher("toy").decide(Size(1)).outcome_of("needy").code is RejectCode.NOT_INSTALLED

    def test_what_is_required_is_not_imported_nor_is_the_package_it_is_in(self, registry, tmp_path, monkeypatch):
        (tmp_path / "tp_heavy").mkdir()
        (tmp_path / "tp_heavy" / "__init__.py").write_text("raise RuntimeError('imported')\n")
        (tmp_path / "tp_heavy" / "inner.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        registry.backend("toy", "needy", requires=("tp_heavy.inner",), priority=99)(lambda n: ("needy", 2 * n))
        assert registry.get("toy")(1) == ("needy", 2)


class TestTheFingerprintOfAFunction:
    @staticmethod
    def fingerprint(run) -> str:
        return FunctionBackend(run, "toy", "mine").fingerprint()

    def written(self, tmp_path, text: str):
        """The function ``run`` of a module with this text, after a decorator of another module's."""
        file = tmp_path / "tp_kernel.py"
        file.write_text(f"import contextlib, functools\n{text}")
        names: dict = {}
        exec(compile(file.read_text(), file, "exec"), names)
        return names["run"]

    @pytest.mark.parametrize(
        "text",
        [
            "def run(n): return {}\n",
            "@contextlib.contextmanager\ndef run(n): yield {}\n",
            "def f(k, n): return {}\nrun = functools.partial(f, 1)\n",
            "class C:\n    def __call__(self, n): return {}\nrun = C()\n",
            "class C:\n    def m(self, n): return {}\nrun = C().m\n",
        ],
        ids=["plain", "decorated", "partial", "callable object", "method"],
    )
    def test_changes_with_the_file_it_is_written_in(self, tmp_path, text):
        prints = [self.fingerprint(self.written(tmp_path, text.format(value))) for value in (1, 1, 2)]
        assert prints[0] == prints[1] != prints[2]

    def test_without_a_file_changes_with_what_it_does(self):
        def cell(number: int, text: str):
            names: dict = {}
            exec(compile(text, f"<cell {number}>", "exec"), names)
            return self.fingerprint(names["run"])

        one = cell(1, "def run(n): return (lambda x: x + 1)(n)")
        assert cell(2, "def run(n): return (lambda x: x + 1)(n)") == one
        assert cell(3, "def run(n): return (lambda x: x + 2)(n)") != one
        assert self.fingerprint(len) != self.fingerprint(abs)


def test_the_first_call_of_a_process_which_finds_the_backends_is_remembered():
    made = Registry()
    made.use_store(Store([]))
    spec = made.spec("fused_sigmoid_gating")
    call = spec.make_inputs(CaseSpec("two", (1, 1), k=8, v=8), 0).kwargs
    op = made.get("fused_sigmoid_gating")
    op(**call)
    op(**call)
    assert op.stats()["misses"] == 1
    assert len(made.dispatcher("fused_sigmoid_gating").bound) == 1


class TestThreads:
    @pytest.fixture(autouse=True)
    def often(self):
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        yield
        sys.setswitchinterval(before)

    @staticmethod
    def at_once(work, count=8):
        barrier, found = threading.Barrier(count), []

        def run():
            barrier.wait()
            found.append(work())

        threads = [threading.Thread(target=run) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == count
        return found

    def test_an_op_is_one_object_whoever_asks_first(self):
        for _ in range(30):
            made = Registry(builtin_ops={}, load_plugins=False)
            made.register_op(toy_spec())
            assert len({id(op) for op in self.at_once(lambda made=made: made.get("toy"))}) == 1

    def test_backends_are_found_once_and_all_of_them_by_everybody(self, recwarn):
        for _ in range(10):
            made = Registry()
            [names] = {tuple(found) for found in self.at_once(lambda made=made: made.backends("fused_sigmoid_gating"))}
            assert len(names) > 10
        assert not [w for w in recwarn if "the name is taken" in str(w.message)]

    def test_backends_that_come_and_go_do_not_disturb_who_looks_through_them(self, registry):
        def come_and_go():
            name = f"thread {threading.get_ident()}"
            for _ in range(50):
                registry.backend("toy", name, priority=-5)(lambda n: n)
                registry.dispatcher("toy").decide(Size(1))
                registry.unregister_backend("toy", name)

        self.at_once(come_and_go, 4)
        assert set(registry.backends("toy")) == {"slow", "fast"}


def test_an_override_from_the_environment_reaches_an_op_with_capitals(monkeypatch):
    monkeypatch.setenv("ISOKERN_BACKEND_TOY2", "slow")
    made = Registry(builtin_ops={}, load_plugins=False)
    made.register_op(toy_spec("Toy2"))
    assert made.environment_override("Toy2") == "slow"


def test_environment_overrides_are_per_op():
    environ = {"ISOKERN_BACKEND_TOY": "slow", "ISOKERN_BACKEND_OTHER": "", "PATH": "x"}
    assert environment_overrides(environ) == {"toy": "slow"}


def test_config_is_ordered_hashable_and_round_trips():
    config = Config.of(tile=8, chunk=64)
    assert config.label == "chunk=64,tile=8"
    assert Config.from_dict(config.to_dict()) == config
    assert hash(config) == hash(Config.of(chunk=64, tile=8))
    assert Config().label == "default"
    with pytest.raises(KeyError):
        config["warps"]
