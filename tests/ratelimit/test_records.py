"""What an answer proves of other requests: values only."""

import pytest

from lemcal_async.ratelimit._slots import RequestRecord, refutes_sliding

PERIOD = 2.0


def past(
    left_at: float, used: int | None = None, *, heard_after: float = 0.1, was_counted: bool = True
) -> RequestRecord:
    """Return a request that was counted within so many seconds after it left."""
    return RequestRecord(
        number=1,
        left_at=left_at,
        counted_by=left_at + heard_after,
        was_counted=was_counted,
        window=None,
        used=used,
    )


class TestRefutesSliding:
    """Whether an answer cannot be that of a sliding log."""

    @pytest.mark.parametrize(
        ("used", "proof"), [(1, True), (2, False), (3, False), (0, False), (None, False)]
    )
    def test_two_too_few(self, used: int | None, proof: bool) -> None:  # noqa: FBT001 - a column
        """It must count what it surely counted less than a period ago; by one, it proves nothing."""
        assert proof is refutes_sliding(past(2.05, used), [past(0.5), past(1.0)], PERIOD)

    @pytest.mark.parametrize(
        "others",
        [
            pytest.param([past(0.1), past(1.0)], id="one may be forgotten"),
            pytest.param([past(1.0), past(2.0)], id="one may have come later"),
            pytest.param([past(1.0), past(1.1, was_counted=False)], id="one may not have been counted"),
        ],
    )
    def test_what_is_not_sure_does_not_count(self, others: list[RequestRecord]) -> None:
        """Then there is one too few to prove anything."""
        assert not refutes_sliding(past(2.05, 1), others, PERIOD)
