"""What a response proves about other requests. Values only."""

import pytest

from lemcal_async.ratelimit._slots import RequestRecord, refutes_sliding

PERIOD = 2.0


def record_of(
    left_at: float, used: int | None = None, *, received_after: float = 0.1, was_counted: bool = True
) -> RequestRecord:
    """Return a request that was counted at most ``received_after`` seconds after it was sent."""
    return RequestRecord(
        number=1,
        left_at=left_at,
        counted_by=left_at + received_after,
        was_counted=was_counted,
        window=None,
        used=used,
    )


class TestRefutesSliding:
    """Whether a response rules out a sliding log."""

    @pytest.mark.parametrize(
        ("used", "proof"), [(1, True), (2, False), (3, False), (0, False), (None, False)]
    )
    def test_count_too_low_by_two_is_proof(self, used: int | None, proof: bool) -> None:  # noqa: FBT001 - a column
        """A sliding log must count all requests of the last period; a difference of one proves nothing."""
        assert proof is refutes_sliding(record_of(2.05, used), [record_of(0.5), record_of(1.0)], PERIOD)

    @pytest.mark.parametrize(
        "others",
        [
            pytest.param([record_of(0.1), record_of(1.0)], id="one may have expired"),
            pytest.param([record_of(1.0), record_of(2.0)], id="one may have arrived later"),
            pytest.param(
                [record_of(1.0), record_of(1.1, was_counted=False)], id="one may not have been counted"
            ),
        ],
    )
    def test_uncertain_requests_do_not_count(self, others: list[RequestRecord]) -> None:
        """Without the uncertain request, the difference is too small to prove anything."""
        assert not refutes_sliding(record_of(2.05, 1), others, PERIOD)
