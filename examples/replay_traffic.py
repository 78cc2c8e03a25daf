"""What a server's batches look like: requests drawn like two public production traces, through continuous batching.

No torch here. A :class:`Mix` says how requests come, a :class:`Server` how it batches them (chunked prefill, a limit of
tokens per step and of sequences), :func:`simulate` plays both and returns the :class:`Step` s: which tokens of which
request are computed, and in which slot of the state pool each request lives. The clock that decides when a request has
arrived is a model of an engine's step time, so a traffic is a pure function of its arguments.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from isokern.errors import ArgumentValueError
from isokern.registry.ops.fused_sigmoid_gating.lengths import CODE_TRACE, CONVERSATION_TRACE, PromptTrace

__all__ = [
    "MIXES",
    "Mix",
    "Piece",
    "Request",
    "Server",
    "Step",
    "Traffic",
    "representative",
    "requests_of",
    "simulate",
    "summary",
]

#: Steps simulated, after settling, to place a window in.
_LONG_RUN = 3000
#: Steps that fill the batch before anything counts: more than nearly every answer takes.
_SETTLE = 1500


@dataclass(frozen=True, slots=True)
class Mix:
    """How requests come.

    Attributes:
        name: of the mix.
        prompts: lognormal of the prompts' lengths; ``longest_prompt``: tokens that longer draws are cut to (the traces
            hold nothing longer, and their means need the cut).
        answer_mean, answer_sigma: mean tokens of the answers and the sigma of their lognormal; ``longest_answer``.
        rate: requests per second at the recorded load. burst: coefficient of variation of the gaps between them; 1 is
            a Poisson process, more is bursts and pauses.
    """

    name: str
    prompts: PromptTrace
    longest_prompt: int
    answer_mean: float
    answer_sigma: float
    longest_answer: int
    rate: float
    burst: float


MIXES = {
    mix.name: mix
    for mix in (
        Mix("conversation", CONVERSATION_TRACE, 14_000, 211.0, 0.9, 1000, 5.5, 1.0),
        Mix("code", CODE_TRACE, 7400, 28.0, 1.3, 1000, 2.6, 3.0),
    )
}


@dataclass(frozen=True, slots=True)
class Server:
    """How an engine batches.

    Attributes:
        max_tokens: of one step, decode rows included. max_sequences: that are served at a time, one slot each.
        step_s, row_s, token_s: seconds of a step, of each decode row and of each prompt token in it: what the clock of
            the simulation advances by.
    """

    max_tokens: int = 8192
    max_sequences: int = 256
    step_s: float = 13e-3
    row_s: float = 8e-6
    token_s: float = 10e-6

    def __post_init__(self) -> None:
        if not 1 <= self.max_sequences <= self.max_tokens:
            expected = f"between 1 and max_tokens = {self.max_tokens}: each decode row is a token"
            raise ArgumentValueError("max_sequences", expected, str(self.max_sequences))
        if min(self.step_s, self.row_s, self.token_s) < 0 or self.step_s == 0:
            raise ArgumentValueError("step_s", "positive, and no negative time", str(self.step_s))


@dataclass(frozen=True, slots=True)
class Request:
    """One request: ``prompt`` tokens in, ``answer`` tokens out, arriving ``arrival_s`` seconds after the start."""

    number: int
    arrival_s: float
    prompt: int
    answer: int

    @property
    def tokens(self) -> int:
        """Tokens that go through the layers: the answer's last one is sampled and goes through none."""
        return self.prompt + self.answer - 1


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens ``start`` to ``start + length`` of one request, in one step; its state is in ``slot``."""

    request: int
    slot: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Step:
    """One batch: decode rows (one token each) first, pieces of prompts behind.

    Attributes:
        pieces: at least one. decode_rows: how many of them, from the first, are decode rows.
    """

    pieces: tuple[Piece, ...]
    decode_rows: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each piece."""
        return tuple(piece.length for piece in self.pieces)

    @property
    def slots(self) -> tuple[int, ...]:
        """Slot of each piece."""
        return tuple(piece.slot for piece in self.pieces)

    @property
    def fresh(self) -> tuple[int, ...]:
        """Slots whose request begins here: their state starts from zero."""
        return tuple(piece.slot for piece in self.pieces if piece.start == 0)

    @property
    def tokens(self) -> int:
        """Tokens of all pieces."""
        return sum(piece.length for piece in self.pieces)

    @property
    def is_decode(self) -> bool:
        """No prompt is in it."""
        return self.decode_rows == len(self.pieces)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Consecutive steps of one mix at one load.

    Attributes:
        mix, load, seed: what was simulated. steps: in order. slots: of the pool; more than any step names.
    """

    mix: Mix
    load: float
    seed: int
    steps: tuple[Step, ...]
    slots: int

    @property
    def label(self) -> str:
        """``"conversation 2.5x"``."""
        return f"{self.mix.name} {self.load:g}x"

    @property
    def decode_share(self) -> float:
        """Share of steps without a prompt."""
        return sum(step.is_decode for step in self.steps) / len(self.steps)

    @property
    def decode_rows(self) -> tuple[int, ...]:
        """Rows of each step without a prompt."""
        return tuple(step.decode_rows for step in self.steps if step.is_decode)

    @property
    def mixed_tokens(self) -> tuple[int, ...]:
        """Tokens of each step with a prompt."""
        return tuple(step.tokens for step in self.steps if not step.is_decode)

    def window(self, count: int) -> Traffic:
        """``count`` consecutive steps, those whose share of decode steps and mean tokens come nearest to the whole's.

        A short replay would else be all decode, or one burst, as its seed has it.
        """
        if not 1 <= count <= len(self.steps):
            raise ArgumentValueError("count", f"from 1 to {len(self.steps)} steps", str(count))
        decode = [0, *itertools.accumulate(int(step.is_decode) for step in self.steps)]
        tokens = [0, *itertools.accumulate(step.tokens for step in self.steps)]
        mean = tokens[-1] / len(self.steps)

        def distance(first: int) -> tuple[float, int]:
            share = (decode[first + count] - decode[first]) / count
            here = (tokens[first + count] - tokens[first]) / count
            return abs(share - self.decode_share) + abs(math.log(here / mean)), first

        first = min(range(len(self.steps) - count + 1), key=distance)
        return replace(self, steps=self.steps[first : first + count])


def requests_of(mix: Mix, load: float, seed: int) -> Iterator[Request]:
    """Requests without end, in order of arrival. A higher load is the same requests in less time."""
    draw = random.Random(f"{mix.name} {seed}")
    shape = mix.burst**-2  # of the gamma distribution whose coefficient of variation is ``burst``
    mu = math.log(mix.answer_mean) - mix.answer_sigma**2 / 2
    now = 0.0
    for number in itertools.count():
        now += draw.gammavariate(shape, 1 / (shape * mix.rate))
        prompt = draw.lognormvariate(mix.prompts.mu, mix.prompts.sigma)
        answer = draw.lognormvariate(mu, mix.answer_sigma)
        yield Request(
            number,
            now / load,
            min(mix.longest_prompt, max(1, round(prompt))),
            min(mix.longest_answer, max(1, round(answer))),
        )


@dataclass(slots=True)
class _Served:
    """A request with a slot, and how many of its tokens are done."""

    request: Request
    slot: int
    done: int = 0

    @property
    def decoding(self) -> bool:
        return self.done >= self.request.prompt


class _Engine:
    """The state of the simulated engine between steps."""

    def __init__(self, server: Server, arrivals: Iterator[Request]) -> None:
        self._server = server
        self._arrivals = arrivals
        self._next = next(arrivals)
        self._now = 0.0
        self._waiting: deque[Request] = deque()
        self._served: list[_Served] = []
        self._free: list[int] = []
        self.slots = 0

    def step(self) -> Step:
        """Batch what is there (or what comes next, if nothing is), and let its time go by."""
        if not self._served and not self._waiting:
            self._now = max(self._now, self._next.arrival_s)
        while self._next.arrival_s <= self._now:
            self._waiting.append(self._next)
            self._next = next(self._arrivals)
        rows = [one for one in self._served if one.decoding]
        pieces = [Piece(one.request.number, one.slot, one.done, 1) for one in rows]
        room = self._server.max_tokens - len(pieces)
        prompts = []
        for one in self._prompts():
            if room == 0:
                break
            length = min(room, one.request.prompt - one.done)
            pieces.append(Piece(one.request.number, one.slot, one.done, length))
            prompts.append((one, length))
            room -= length
        for one in rows:
            one.done += 1
        for one, length in prompts:
            one.done += length
        for one in [one for one in self._served if one.done == one.request.tokens]:
            self._served.remove(one)
            heapq.heappush(self._free, one.slot)
        server, tokens = self._server, sum(length for _, length in prompts)
        self._now += server.step_s + server.row_s * len(rows) + server.token_s * tokens
        return Step(tuple(pieces), len(rows))

    def _prompts(self) -> Iterator[_Served]:
        """Prompts begun earlier, then those that wait, each given a slot when it is asked for."""
        yield from [one for one in self._served if not one.decoding]
        while self._waiting and len(self._served) < self._server.max_sequences:
            if not self._free:
                self._free.append(self.slots)
                self.slots += 1
            one = _Served(self._waiting.popleft(), heapq.heappop(self._free))
            self._served.append(one)
            yield one


def simulate(
    mix: Mix, load: float, steps: int, seed: int = 0, server: Server | None = None, settle: int = _SETTLE
) -> Traffic:
    """``steps`` consecutive steps of ``mix`` at ``load`` times its recorded rate.

    Args:
        settle: steps served before, from an empty engine, that are not among them. A request that was begun in those
            continues in the first step: its earlier tokens are in its slot's state.

    Raises:
        ArgumentValueError: no steps, no load, or the server's limits contradict each other.
    """
    if steps < 1:
        raise ArgumentValueError("steps", "at least one step", str(steps))
    if not 0 < load < math.inf:
        raise ArgumentValueError("load", "a positive multiple of the recorded load", str(load))
    engine = _Engine(server or Server(), requests_of(mix, load, seed))
    for _ in range(settle):
        engine.step()
    taken = tuple(engine.step() for _ in range(steps))
    return Traffic(mix, load, seed, taken, engine.slots)


def representative(mix: Mix, load: float, steps: int, seed: int = 0, server: Server | None = None) -> Traffic:
    """``steps`` consecutive steps that are like the long run of ``mix`` at ``load``; see :meth:`Traffic.window`."""
    return simulate(mix, load, max(steps, _LONG_RUN), seed, server).window(steps)


def summary(traffic: Traffic) -> str:
    """One line: share of decode steps, their median rows, the median tokens of the others."""

    def median(values: Sequence[int]) -> str:
        return f"{statistics.median(values):g}" if values else "none"

    return (
        f"{len(traffic.steps)} steps, {100 * traffic.decode_share:.0f} % pure decode "
        f"(median N {median(traffic.decode_rows)}), the others {median(traffic.mixed_tokens)} tokens (median); "
        f"{traffic.slots} slots"
    )
