"""When a call's turn comes at the earliest, from when the slots before it may come free. Pure.

A call is refused for its deadline only if it surely cannot be met. So these are lower bounds, for either
way in which the server may count: what the answers will teach can only be guessed.
"""


def turn_in_log(now: float, ends: list[float], limit: int, period: float, ahead: int) -> float:
    """Return when a call with ``ahead`` others before it may go, if each slot goes round by itself."""
    free = limit - len(ends)
    if ahead < free:
        return now
    turn = ahead - free
    ends = sorted(ends)
    if turn < len(ends):
        return ends[turn]
    rounds, place = divmod(turn - len(ends), limit)
    last_round = ends[-limit:] if free <= 0 else ends
    again = last_round[place - max(free, 0)] if place >= free else now
    return again + (rounds + 1) * period


def turn_in_windows(now: float, ends: list[float], limit: int, period: float, ahead: int) -> float:
    """Return when a call with ``ahead`` others before it may go, if all slots come free with the first."""
    free = max(0, limit - len(ends))
    if ahead < free:
        return now
    return min(ends, default=now + period) + (ahead - free) // limit * period
