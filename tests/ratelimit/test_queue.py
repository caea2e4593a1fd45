"""The queue of one key: first in, first out in two lanes, and refused requests before all others."""

import copy
import itertools
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Literal

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from lemcal_async.ratelimit import Priority
from lemcal_async.ratelimit._waiters import BULK_SHARE, Queue, Waiter

priorities = st.sampled_from(["interactive", "bulk"])
LOOPS = ["asyncio", "trio", "thread"]


class Call(Waiter):
    """The part of a waiter that the queue uses, without an event loop."""

    def __init__(
        self,
        number: int,
        priority: Priority = "interactive",
        *,
        refused: bool = False,
        loop: Hashable = "asyncio",
    ) -> None:
        self.number = number
        self.priority = priority
        self.refused = refused
        self.loop = loop


def queue_of(waiters: Iterable[Waiter]) -> Queue:
    """Return a queue with the waiters added in this order."""
    queue = Queue()
    for waiter in waiters:
        queue.add(waiter)
    return queue


def served(queue: Queue) -> list[Waiter]:
    """Serve all waiters; return them in the order served."""
    order = []
    while (head := queue.head()) is not None:
        queue.pop(head)
        order.append(head)
    return order


def numbers(waiters: Iterable[Waiter]) -> list[int]:
    """Return the numbers of the waiters."""
    return [waiter.number for waiter in waiters]


def test_an_empty_queue() -> None:
    """An empty queue has no head and no alarms, and a new waiter has nobody ahead."""
    queue = Queue()
    assert (0, None, []) == (len(queue), queue.head(), queue.alarms())
    assert (0, 0) == (queue.ahead_of("interactive"), queue.ahead_of("bulk"))
    assert queue.discard(Call(1)) is False


@pytest.mark.parametrize("priority", ["interactive", "bulk"])
def test_each_lane_is_first_in_first_out(priority: Priority) -> None:
    """Waiters of one lane are served in the order in which they were added."""
    queue = queue_of(Call(number, priority) for number in range(10))
    assert 10 == len(queue)
    assert list(range(10)) == numbers(served(queue))
    assert 0 == len(queue)


@pytest.mark.parametrize("priority", ["interactive", "bulk"])
def test_order_is_kept_across_event_loops(priority: Priority) -> None:
    """Waiters of several event loops are served as if they belonged to one."""
    queue = queue_of(Call(number, priority, loop=LOOPS[number % 3]) for number in range(30))
    assert list(range(30)) == numbers(served(queue))


def test_bulk_gets_every_fifth_turn() -> None:
    """While both lanes wait, four interactive waiters are served before each bulk one."""
    queue = queue_of([Call(number, "bulk") for number in range(3)])
    for number in range(10, 22):
        queue.add(Call(number))
    expected = [10, 11, 12, 13, 0, 14, 15, 16, 17, 1, 18, 19, 20, 21, 2]
    assert expected == numbers(served(queue))


def test_bulk_gets_every_turn_if_alone() -> None:
    """Bulk waiters only wait while interactive ones are queued."""
    queue = queue_of([Call(0, "bulk"), Call(1, "bulk"), Call(2)])
    assert [2, 0, 1] == numbers(served(queue))


def test_interactive_turns_only_count_while_bulk_waits() -> None:
    """Interactive turns taken while no bulk waiter was queued do not count toward its turn."""
    queue = queue_of(Call(number) for number in range(30))
    for _ in range(9):
        queue.pop(queue.head() or pytest.fail("the queue is empty"))
    queue.add(Call(99, "bulk"))
    assert [*range(9, 13), 99, 13] == numbers(served(queue))[:6]


def test_refused_waiters_go_first_by_number() -> None:
    """Refused waiters go before all others, in their original order."""
    queue = queue_of(
        [
            Call(50),
            Call(51, "bulk"),
            Call(7, refused=True),
            Call(3, "bulk", refused=True),
            Call(9, refused=True, loop="trio"),
            Call(5, refused=True, loop="trio"),
            Call(8, refused=True),
        ]
    )
    assert [3, 5, 7, 8, 9, 50, 51] == numbers(served(queue))


@pytest.mark.parametrize("order", [*itertools.permutations([3, 5, 7, 9])])
def test_refused_waiters_return_in_any_order(order: tuple[int, ...]) -> None:
    """Each refused waiter is sorted in among those already back."""
    assert [3, 5, 7, 9] == numbers(served(queue_of(Call(number, refused=True) for number in order)))


def test_refused_waiters_do_not_count_as_turns() -> None:
    """Serving a refused waiter counts neither for nor against the bulk lane's share."""
    queue = queue_of([Call(0, "bulk"), *(Call(number) for number in range(10, 16))])
    for _ in range(3):
        queue.pop(queue.head() or pytest.fail("the queue is empty"))
    queue.add(Call(10, refused=True))
    assert [10, 13, 0, 14, 15] == numbers(served(queue))


@pytest.mark.parametrize(
    ("place", "left"),
    [(0, [1, 2, 3, 4]), (2, [0, 1, 3, 4]), (4, [0, 1, 2, 3])],
    ids=["head", "middle", "tail"],
)
def test_discard_keeps_the_order_of_the_others(place: int, left: list[int]) -> None:
    """A waiter is removed from any position, once; the others keep their order."""
    waiters = [Call(number) for number in range(5)]
    queue = queue_of(waiters)
    assert queue.discard(waiters[place]) is True
    assert queue.discard(waiters[place]) is False
    assert 4 == len(queue)
    assert left == numbers(served(queue))


def test_waiters_are_compared_by_identity() -> None:
    """A different waiter with the same number, loop and lane is not in the queue."""
    queue = queue_of([Call(1)])
    assert queue.discard(Call(1)) is False
    assert 1 == len(queue)


def test_clear_removes_all_waiters() -> None:
    """After a fork, the waiters belong to the parent; the queue can be used again."""
    waiters = [Call(1), Call(2, "bulk"), Call(3, refused=True), Call(4, loop="trio")]
    queue = queue_of(waiters)
    queue.clear()
    assert (0, None, []) == (len(queue), queue.head(), queue.alarms())
    assert not any(queue.discard(waiter) for waiter in waiters)
    queue.add(Call(5))
    assert [5] == numbers(served(queue))


def test_one_alarm_per_event_loop() -> None:
    """Each loop with waiters has one that sets the alarm, preferably a refused one."""
    waiters = [
        Call(1, loop="asyncio"),
        Call(2, loop="asyncio"),
        Call(3, "bulk", loop="trio"),
        Call(4, loop="trio"),
        Call(5, "bulk", loop="thread"),
        Call(0, refused=True, loop="asyncio"),
    ]
    queue = queue_of(waiters)
    assert {("asyncio", 0), ("trio", 4), ("thread", 5)} == {(t.loop, t.number) for t in queue.alarms()}
    for waiter in waiters[2:5]:
        queue.discard(waiter)
    assert [0] == numbers(queue.alarms())


def test_is_first_of_lane_and_loop() -> None:
    """Each lane and loop has one first waiter; after it is removed, the next one is first."""
    first, second, bulk, refused, other = waiters = [
        Call(1),
        Call(2),
        Call(3, "bulk"),
        Call(4, refused=True),
        Call(5, loop="trio"),
    ]
    queue = queue_of(waiters)
    assert [first, bulk, refused, other] == [waiter for waiter in waiters if queue.is_first(waiter)]
    queue.discard(first)
    assert (False, True) == (queue.is_first(first), queue.is_first(second))


@pytest.mark.parametrize(
    ("refused", "interactive", "bulk", "ahead_of_interactive", "ahead_of_bulk"),
    [
        (0, 0, 0, 0, 0),
        (2, 0, 0, 2, 2),
        (0, 5, 0, 5, 4),
        (0, 3, 0, 3, 3),
        (0, 0, 5, 0, 5),
        (1, 6, 2, 7, 9),
        (1, 100, 2, 101, 15),
    ],
)
def test_ahead_of(
    refused: int, interactive: int, bulk: int, ahead_of_interactive: int, ahead_of_bulk: int
) -> None:
    """New interactive waiters wait for their lane, bulk ones also for four interactive waiters per turn."""
    queue = queue_of(
        [
            *(Call(number, refused=True) for number in range(refused)),
            *(Call(100 + number) for number in range(interactive)),
            *(Call(300 + number, "bulk") for number in range(bulk)),
        ]
    )
    assert (ahead_of_interactive, ahead_of_bulk) == (queue.ahead_of("interactive"), queue.ahead_of("bulk"))


def test_turns_taken_shorten_the_wait_of_bulk() -> None:
    """After three interactive turns, only one more precedes the next bulk turn."""
    queue = queue_of([*(Call(number) for number in range(20)), Call(50, "bulk")])
    assert 9 == queue.ahead_of("bulk")
    for _ in range(3):
        queue.pop(queue.head() or pytest.fail("the queue is empty"))
    assert 6 == queue.ahead_of("bulk")


class QueueMachine(RuleBasedStateMachine):
    """Compares the queue with a plain list."""

    waiters: Bundle[Waiter] = Bundle("waiters")

    @initialize()
    def start(self) -> None:
        """Start with an empty queue."""
        self.queue = Queue()
        self.waiting: list[Waiter] = []
        self.served: list[Waiter] = []
        self.counter = itertools.count()
        self.passed = 0

    @rule(target=waiters, priority=priorities, loop=st.sampled_from(LOOPS), count=st.integers(1, 6))
    def add(self, priority: Priority, loop: str, count: int) -> MultipleResults[Waiter]:
        """Add new waiters."""
        waiters = [Call(next(self.counter), priority, loop=loop) for _ in range(count)]
        for waiter in waiters:
            self.queue.add(waiter)
        self.waiting += waiters
        return multiple(*waiters)

    @precondition(lambda self: self.served)
    @rule(target=waiters, data=st.data(), loop=st.sampled_from(LOOPS))
    def refuse(self, data: st.DataObject, loop: str) -> Waiter:
        """Return a served waiter as refused, with its original number."""
        first = self.served.pop(data.draw(st.integers(0, len(self.served) - 1)))
        waiter = Call(first.number, first.priority, refused=True, loop=loop)
        self.queue.add(waiter)
        self.waiting.append(waiter)
        return waiter

    @rule(turns=st.integers(1, 7))
    def serve(self, turns: int) -> None:
        """Serve waiters; each head must be the one that the list expects."""
        for _ in range(turns):
            head = self.queue.head()
            assert self.expected_head() is head
            if head is None:
                return
            self.queue.pop(head)
            self.waiting.remove(head)
            self.served.append(head)
            if not head.refused:
                passes = head.priority == "interactive" and self.lane("bulk")
                self.passed = self.passed + 1 if passes else 0
                assert self.passed < BULK_SHARE

    @rule(waiter=waiters)
    def discard(self, waiter: Waiter) -> None:
        """Remove any waiter, even one already removed."""
        assert (waiter in self.waiting) is self.queue.discard(waiter)
        if waiter in self.waiting:
            self.waiting.remove(waiter)

    @rule(priority=priorities)
    def count_ahead(self, priority: Priority) -> None:
        """Compare ``ahead_of`` with the actual order if nobody else is added."""
        ahead = self.queue.ahead_of(priority)
        queue: Queue = copy.deepcopy(self.queue)
        newcomer = Call(next(self.counter), priority, loop="another")
        queue.add(newcomer)
        turn = served(queue).index(newcomer)
        if priority == "bulk":
            assert turn == ahead
        else:  # leaves out the bulk lane's share, at most one in four of the others
            assert ahead <= turn <= ahead + (ahead + self.passed) // (BULK_SHARE - 1)

    @rule()
    def clear(self) -> None:
        """Clear the queue, as after a fork."""
        self.queue.clear()
        self.waiting.clear()

    @invariant()
    def agree(self) -> None:
        """Compare the waiters of the queue and the list, and require one alarm for each loop with waiters."""
        assert len(self.waiting) == len(self.queue)
        alarms = self.queue.alarms()
        assert {*alarms} <= {*self.waiting}
        assert Counter({waiter.loop for waiter in self.waiting}) == Counter(t.loop for t in alarms)

    def lane(self, priority: Literal["interactive", "bulk", "refused"]) -> list[Waiter]:
        """Return the waiters of one lane, in number order."""
        lane = [t for t in self.waiting if priority == ("refused" if t.refused else t.priority)]
        return sorted(lane, key=lambda waiter: waiter.number)

    def expected_head(self) -> Waiter | None:
        """Return the expected head according to the rules."""
        refused, interactive, bulk = (self.lane(name) for name in ("refused", "interactive", "bulk"))
        if self.passed == BULK_SHARE - 1:
            lanes = [refused, bulk, interactive]
        else:
            lanes = [refused, interactive, bulk]
        return next((lane[0] for lane in lanes if lane), None)


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestQueueAgainstAList = QueueMachine.TestCase
