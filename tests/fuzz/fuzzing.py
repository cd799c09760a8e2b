"""What all fuzz tests share: how many cases there are, damaged values and documents, and what a good ending is.

In the suite every test has a fixed number of cases, the same ones each time. `pytest tests/fuzz -s --fuzz 60` tries new
ones, for 60 seconds a test, and says how many.
"""

import contextlib
import copy
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

T = TypeVar("T")

SECONDS = 10  # of processor time that a case may take
PATIENCE = 60  # seconds after which it hangs, however little it computes
MEMORY = 2**30  # bytes that a case may add
LONGEST_MESSAGE = 1500  # characters of one line
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 1.5, 100, 65_536, 1_000_000, 10**9, 10**30, -(10**30), 2**31, 2**63, 1e308,
    float("nan"), float("inf"), "", "x", "9" * 5000, "\ud83d", "a" * 100_000, "\0", "\x1b[31m", "a\nb", "../x.jpg",
    "/etc/passwd", "C:\\x", [], [[]], {}, {"a": 1}, [None], [0], [-1], [[1, 2], [3]], [1.5, "a"],
]  # fmt: skip


def run_cases(request: pytest.FixtureRequest, cases: st.SearchStrategy[T], check: Callable[[T], None], count: int):
    """`check` within the limits on `count` cases, or on new ones for as long as --fuzz says."""
    budget = request.config.getoption("--fuzz")
    options = settings(
        max_examples=count,
        derandomize=budget is None,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    def one(case: T) -> None:
        with limits():
            check(case)

    if budget is None:
        options(given(case=cases)(one))()
        return
    done, faults, end = 0, dict[str, str](), time.monotonic() + budget

    def another(case: T) -> None:
        nonlocal done
        done += time.monotonic() < end
        try:
            if time.monotonic() < end:
                one(case)
        except Exception as error:
            place = " <- ".join(f"{f.filename.split('groundingdino/')[-1]}:{f.lineno}" for f in places(error)[:-4:-1])
            faults.setdefault(place, f"{place}\n    {error!r:.300}\n    {case!r:.300}")

    while time.monotonic() < end:
        seed(time.time_ns())(options(given(case=cases)(another)))()
    print(f"\n{request.node.name}: {done} cases, {len(faults)} faults", *faults.values(), sep="\n  ")
    assert not faults


def places(error: BaseException) -> list[traceback.FrameSummary]:
    """Where an error came through: of the library where it did, else all."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if "/groundingdino/" in frame.filename] or list(frames)


@contextlib.contextmanager
def limits(seconds: float = SECONDS, patience: float = PATIENCE) -> Iterator[None]:
    """Fails where the block computes or takes too long, and lets allocations fail that add more than `MEMORY`.

    `seconds` are of the processor, of this process and of those that it has waited for: what else the machine does
    makes no fault.
    """
    ended = False

    def too_long(*_: object) -> None:
        nonlocal ended
        ended = True
        raise AssertionError(f"no end after {seconds:g} s of processor time or {patience:g} s")

    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handlers = {kind: signal.signal(kind, too_long) for kind in (signal.SIGPROF, signal.SIGALRM)}
    computed = sum(os.times()[:4])
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds, seconds)
    signal.setitimer(signal.ITIMER_REAL, patience, patience)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
    if ended or sum(os.times()[:4]) - computed > seconds:  # the block caught the error, or its processes computed
        too_long()


def outcome(attempt: Callable[[], T], *names: str, refusals: tuple[type[Exception], ...] = (ValueError,)) -> T | None:
    """What `attempt` returns; None where it was refused in one printable line that says all of `names`."""
    try:
        return attempt()
    except refusals as error:
        message = str(error)
        assert message.isprintable() and 5 < len(message) < LONGEST_MESSAGE, (type(error), message[:LONGEST_MESSAGE])
        assert all(name in message for name in names), message
        return None


def every_place(value: Any, way: tuple = ()) -> list[tuple]:
    """The ways to all values inside a document (of long lists, the first three)."""
    inside: Iterable[tuple] = ()
    if isinstance(value, dict | list | tuple):
        inside = value.items() if isinstance(value, dict) else enumerate(value[:3])
    return [way, *(place for key, part in inside for place in every_place(part, (*way, key)))]


def replaced(value: Any, way: tuple, new: Any) -> Any:
    """A copy of the document with `new` in one place; without that field where `new` is ..."""
    if not way:
        return new
    key, *rest = way
    parts = list(value) if isinstance(value, list | tuple) else dict(value)
    if new is ... and not rest:
        del parts[key]
    else:
        parts[key] = replaced(parts[key], tuple(rest), new)
    return tuple(parts) if isinstance(value, tuple) else parts


def damaged(document: Any, values: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[Any]:
    """The document with an odd value in one place, or two, or without a field."""
    places = every_place(document)[1:]
    odd = st.sampled_from([..., *ODD_VALUES]) if values is None else st.one_of(st.just(...), values)
    change = st.tuples(st.sampled_from(places), odd)

    def apply(changes: list[tuple[tuple, Any]]) -> Any:
        result = document
        for way, new in changes:
            with contextlib.suppress(LookupError, TypeError, ValueError):  # the first change took this place away
                result = replaced(result, way, copy.deepcopy(new) if new is not ... else ...)
        return result

    return st.lists(change, min_size=1, max_size=2).map(apply)


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes, busy: int | None = None) -> bytes:
    """The content cut, longer, or with some bytes changed; mostly within its first `busy` bytes."""
    end = draw(st.sampled_from([len(content), min(busy or len(content), len(content))]))
    place = draw(st.integers(0, end - 1))
    kind = draw(st.sampled_from(["cut", "longer", "changed", "changed", "changed", "removed", "moved"]))
    few = draw(st.binary(min_size=1, max_size=8))
    if kind == "cut":
        return content[:place]
    if kind == "longer":
        return content[:place] + few + content[place:]
    if kind == "removed":
        return content[:place] + content[place + len(few) :]
    if kind == "moved":
        other = draw(st.integers(0, len(content) - 1))
        few = content[other : other + 64]
    return content[:place] + few + content[place + len(few) :]
