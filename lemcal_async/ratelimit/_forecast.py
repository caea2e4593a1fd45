"""How soon a call's turn comes, given when the slots before it may come free. Pure.

A call is refused for its deadline only if the deadline surely cannot be met. So this is how fast the
queue can move under either way of counting: what the answers will teach can only be guessed. All times
are seconds from now; ``ends`` has one for each occupied slot.
"""


def turn_in_log(ends: list[float], limit: int, period: float, ahead: int) -> float:
    """Return when a call with ``ahead`` others before it may go, if each slot comes free by itself."""
    free = limit - len(ends)
    if ahead < free:
        return 0.0
    turn = ahead - free
    ends = sorted(ends)
    if turn < len(ends):
        return ends[turn]
    rounds, place = divmod(turn - len(ends), limit)
    last_round = ends[-limit:] if free <= 0 else ends
    again = last_round[place - max(free, 0)] if place >= free else 0.0
    return again + (rounds + 1) * period


def turn_in_windows(ends: list[float], limit: int, period: float, ahead: int) -> float:
    """Return when a call with ``ahead`` others before it may go, if all slots come free with the first.

    Should some come free by themselves before the current window is over, of which nothing is known yet,
    it is one period less.
    """
    free = max(0, limit - len(ends))
    if ahead < free:
        return 0.0
    return min(ends, default=period) + (ahead - free) // limit * period
