"""Parsing the rate-limit headers in every format."""

import datetime as dt
import math

import httpx
import pytest
from hypothesis import given, strategies as st

from lemcal_async._headers import Quota, parse_date, parse_quota, parse_raw_quota, parse_retry_after

DATE = "Tue, 16 Feb 2021 08:02:40 GMT"  # the response's Date, two seconds before the dates below
AT = dt.datetime(2021, 2, 16, 8, 2, 42, tzinfo=dt.UTC)
# strftime depends on the locale.
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]

SAME_MOMENT = [
    "Tue Feb 16 2021 09:02:42 GMT+0100 (Central European Standard Time)",
    "Tue Feb 16 2021 09:02:42 GMT+0100",
    "Tue Feb 16 2021 09:02:42 GMT+01:00",
    "Tue Feb 16 2021 13:32:42 GMT+0530 (India Standard Time)",
    "Tue Feb 16 2021 00:02:42 GMT-0800 (Pacific Standard Time)",
    "Tue Feb 16 2021 08:02:42 GMT+0000 (Coordinated Universal Time)",
    "Tue Feb 16 2021 08:02:42 GMT",
    "Tue Feb 16 2021 08:02:42 UTC",
    "Tue Feb 16 2021 08:02:42",
    "Tue, 16 Feb 2021 08:02:42 GMT",
]
INVALID = [
    "",
    " ",
    ",",
    "nan",
    "inf",
    "-inf",
    "Infinity",
    "1e9999",
    "1e3",
    "9" * 400,
    "0x10",
    "1_000",
    "٣",
    "2 s",
    "2;3",
    "--2",
    ".",
    "soon",
    "{}",
]
INVALID_DATES = [
    "Tue Foo 16 2021 09:02:42 GMT+0100",
    "Tue Feb 30 2021 09:02:42 GMT+0100",
    "Tue Feb 16 2021 25:02:42",
    "Tue Feb 16 2021 09:02:42 GMT+9959",
    "Tue Feb 16 0000 09:02:42",
    "Tue, 31 Feb 2021 08:02:42 GMT",
    "Tue, 16 Foo 2021 08:02:42 GMT",
    "Tue, 16 Feb 2021 :::::::: GMT",
    "2021-02-16T08:02:42Z",
]


# -------------------------------------------------------------------------------- Retry-After
@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2", 2.0),
        ("1.283", 1.283),
        ("0.039", 0.039),
        ("0", 0.0),
        (" 2 ", 2.0),
        ("+2", 2.0),
        ("2.", 2.0),
        (".5", 0.5),
        ("86400", 86400.0),
    ],
)
def test_numbers_of_seconds(value: str, seconds: float) -> None:
    """Retry-After may be fractional: the service sends milliseconds divided by 1000."""
    assert seconds == parse_retry_after(value)


@pytest.mark.parametrize("value", ["-5", "-0.5", "-.5"])
def test_negative_seconds(value: str) -> None:
    """A negative number means no wait."""
    assert 0.0 == parse_retry_after(value)


@pytest.mark.parametrize("value", [None, *INVALID, *INVALID_DATES])
def test_invalid_values(value: str | None) -> None:
    """A value that is neither seconds nor a date is ignored, and never causes an infinite wait."""
    assert parse_retry_after(value, DATE) is None


@pytest.mark.parametrize("date", SAME_MOMENT)
def test_absolute_dates(date: str) -> None:
    """A JavaScript or HTTP date, with any offset, is relative to the response's Date."""
    assert 2.0 == parse_retry_after(date, DATE)


@pytest.mark.parametrize("date", SAME_MOMENT)
@pytest.mark.parametrize("date_header", [None, "", "yesterday"])
def test_absolute_dates_without_a_date_header(date: str, date_header: str | None) -> None:
    """Without a Date header, an absolute date is ignored: the local clock may be hours off."""
    assert parse_retry_after(date, date_header) is None


@pytest.mark.parametrize("date", SAME_MOMENT)
def test_past_dates(date: str) -> None:
    """A date before the response's Date means no wait."""
    assert 0.0 == parse_retry_after(date, "Tue, 16 Feb 2021 08:02:43 GMT")


@pytest.mark.parametrize("date", SAME_MOMENT)
def test_joined_headers(date: str) -> None:
    """If two headers were joined, the number of seconds is used, because it is more precise."""
    assert 1.283 == parse_retry_after(f"1.283, {date}", DATE)
    assert 1.283 == parse_retry_after(f"{date}, 1.283", DATE)
    assert 1.283 == parse_retry_after(f"{date},1.283")


def test_joined_dates() -> None:
    """Of two joined dates, the first is used."""
    assert 2.0 == parse_retry_after(f"{SAME_MOMENT[0]}, {SAME_MOMENT[3]}", DATE)


# -------------------------------------------------------------------------------------- dates
@pytest.mark.parametrize("date", SAME_MOMENT)
def test_dates_are_aware(date: str) -> None:
    """All formats of a moment give the same aware datetime."""
    assert parse_date(date) == AT


@pytest.mark.parametrize("value", [None, *INVALID, *INVALID_DATES])
def test_invalid_dates(value: str | None) -> None:
    """A value that only looks like a date gives None."""
    assert parse_date(value) is None


@given(
    st.datetimes(dt.datetime(1970, 1, 1), dt.datetime(2100, 1, 1)),  # noqa: DTZ001  # the zone is drawn next
    st.integers(-12 * 4, 14 * 4).map(lambda quarters: dt.timezone(dt.timedelta(minutes=15 * quarters))),
)
def test_javascript_dates(naive: dt.datetime, zone: dt.timezone) -> None:
    """Any moment in any time zone is parsed to the second."""
    moment = naive.replace(microsecond=0, tzinfo=zone)
    printed = f"Sat {MONTHS[moment.month - 1]} {moment:%d %Y %H:%M:%S GMT%z} (Somewhere)"
    assert moment == parse_date(printed)


# ---------------------------------------------------------------------------------- the quota
RESET_AT = dt.datetime(2021, 2, 16, 8, 2, 42, tzinfo=dt.UTC).timestamp()


def test_all_headers() -> None:
    """The headers that the vendor documents."""
    headers = httpx.Headers(
        {
            "Date": DATE,
            "Retry-After": "1.283",
            "X-RateLimit-Limit": "20",
            "X-RateLimit-Remaining": "0",
            "X-RateLimit-Reset": SAME_MOMENT[0],
        }
    )
    expected = Quota(limit=20, remaining=0, retry_after=1.283, resets_in=1.283, reset_at=RESET_AT)
    assert expected == parse_quota(headers)


def test_reset_date_without_retry_after() -> None:
    """Without a valid Retry-After, the reset date gives the end of the window, but no ``retry_after``."""
    headers = {"date": DATE, "retry-after": "nan", "x-ratelimit-reset": SAME_MOMENT[0]}
    assert Quota(resets_in=2.0, reset_at=RESET_AT) == parse_quota(headers)


def test_no_headers() -> None:
    """A response without headers has no quota."""
    assert Quota() == parse_quota({})


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("20", 20),
        (" 20 ", 20),
        ("0", 0),
        ("", None),
        ("-1", None),
        ("1.5", None),
        ("²", None),
        ("20, 20", None),
        ("2\x1d", 2),
        ("9" * 5000, None),
    ],
)
def test_counts(value: str, number: int | None) -> None:
    """Limit and remaining are non-negative integers, or None."""
    quota = parse_quota({"x-ratelimit-limit": value, "x-ratelimit-remaining": value})
    assert (number, number) == (quota.limit, quota.remaining)


# ---------------------------------------------------------------------------------- properties
pieces = st.one_of(
    st.sampled_from([*SAME_MOMENT, *INVALID, *INVALID_DATES, DATE, "-5", "2", ", ", "GMT", "1e9999"]),
    st.floats().map(str),
    st.integers().map(str),
    st.from_regex(r"[A-Z][a-z]{2} (Jan|Feb|Dec) \d{1,2} \d{4} \d\d:\d\d:\d\d GMT[+-]\d{4}", fullmatch=True),
    st.from_regex(r"[A-Z][a-z]{2}, \d\d (Jan|Feb|Dec) \d{4} [0-9:]{8} GMT", fullmatch=True),
    st.text(max_size=20),
)
values = st.lists(pieces, min_size=1, max_size=3).map(",".join)


@given(
    st.dictionaries(
        st.sampled_from(
            ["date", "retry-after", "x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"]
        ),
        values,
    )
)
def test_any_headers_give_finite_waits_or_none(headers: dict[str, str]) -> None:
    """No header raises, or gives a wait that is negative, infinite or NaN."""
    quota = parse_quota(headers)
    for seconds in (quota.retry_after, quota.resets_in):
        assert seconds is None or (math.isfinite(seconds) and seconds >= 0)
    for count in (quota.limit, quota.remaining):
        assert count is None or count >= 0


def test_raw_headers() -> None:
    """Same result as with httpx: any case, repeated headers joined, other headers not necessarily ASCII."""
    raw = [
        (b"X-RateLimit-Limit", b"20"),
        (b"x-ratelimit-remaining", b" 7"),
        (b"RETRY-AFTER", b"1.283"),
        (b"Retry-After", SAME_MOMENT[0].encode()),
        (b"X-RateLimit-Reset", SAME_MOMENT[0].encode()),
        (b"Date", DATE.encode()),
        (b"X-City", "Zürich".encode("latin-1")),
    ]
    assert parse_quota(httpx.Headers(raw)) == parse_raw_quota(raw)
    assert Quota(20, 7, 1.283, 1.283, RESET_AT) == parse_raw_quota(raw)
    assert Quota() == parse_raw_quota([])
