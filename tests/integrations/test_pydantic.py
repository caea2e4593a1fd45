"""Models in pydantic models and FastAPI routes: validation, serialization and schema use the wire format."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from fastapi import Body, FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel, TypeAdapter, ValidationError

from lemcal_async import Hook, Meeting, MeetingType, User, from_wire, to_wire
from lemcal_async._codegen import fields_of
from lemcal_async.models import Model

DATA = Path(__file__).parents[1] / "data"
MODELS: tuple[Any, ...] = get_args(Model)


def sample(name: str) -> Any:
    """Read a sample response of the service."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


class Briefing(BaseModel):
    """A model of a user's own service."""

    meeting: Meeting
    types: list[MeetingType] = []
    owner: User | None = None


ODD = {
    "_id": "mee_odd",
    "eventId": 7,
    "attendees": [None, {"email": "a@example.com", "primary": 1}],
    "new": [1],
}


@pytest.mark.parametrize("row", [sample("meeting_public"), sample("meeting_canceled"), ODD])
def test_field_of_a_pydantic_model(row: Any) -> None:
    """A field accepts JSON, Python data and models; dumping and validating gives an equal value."""
    data = {"meeting": row, "types": [sample("meeting_type")], "owner": sample("user")}
    from_json = Briefing.model_validate_json(json.dumps(data))
    expected = Briefing(
        meeting=from_wire(row, Meeting),
        types=[from_wire(sample("meeting_type"), MeetingType)],
        owner=from_wire(sample("user"), User),
    )
    assert expected == from_json == Briefing.model_validate(data)
    assert from_json == Briefing.model_validate_json(from_json.model_dump_json())
    assert json.dumps(to_wire(from_json.meeting)) == json.dumps(from_json.model_dump()["meeting"])
    assert data | {"meeting": to_wire(from_json.meeting)} == json.loads(from_json.model_dump_json())
    assert Briefing(meeting=expected.meeting).meeting is expected.meeting
    assert from_json == from_json.model_copy(deep=True)


@pytest.mark.parametrize(
    ("meeting", "problem"),
    [
        ({"start": None}, "_id: expected a non-empty string, got null"),
        ([], "expected an object, got list"),
        (from_wire({"_id": "x"}, User), "expected an object, got User"),
    ],
)
def test_invalid_meeting(meeting: Any, problem: str) -> None:
    """An invalid value is a validation error at the right location, with the codec's message."""
    with pytest.raises(ValidationError) as caught:
        Briefing.model_validate({"meeting": meeting})
    (error,) = caught.value.errors()
    assert (("meeting",), problem, "lemcal_model") == (error["loc"], error["msg"], error["type"])


@pytest.mark.parametrize("mode", ["validation", "serialization"])
@pytest.mark.parametrize("model", MODELS)
def test_schema_of_every_model(model: Any, mode: Any) -> None:
    """The schema has all fields under their wire names, with descriptions; only the id is required."""
    schema = TypeAdapter(model).json_schema(mode=mode)
    found = schema["$defs"][model.__name__] if "$ref" in schema else schema
    assert [field.names.default for field in fields_of(model)] == list(found["properties"])
    assert all(field["description"].endswith(".") for field in found["properties"].values())
    assert ["_id"] * hasattr(model, "id") * ("_id" in found["properties"]) == found.get("required", [])
    assert (True, "object") == (found["additionalProperties"], found["type"])
    assert model.__doc__.startswith(found["description"])


def test_types_in_the_schema() -> None:
    """Times, lists and nested models have types; free-form JSON has none."""
    meeting = Briefing.model_json_schema()["$defs"]["Meeting"]["properties"]
    time = {"anyOf": [{"format": "date-time", "type": "string"}, {"type": "null"}]}
    assert time["anyOf"] == meeting["canceledAt"]["anyOf"]
    assert ("array", {"$ref": "#/$defs/Attendee"}) == (
        meeting["attendees"]["type"],
        meeting["attendees"]["items"],
    )
    assert {"title", "description"} == set(meeting["providedInfos"])
    duration = Briefing.model_json_schema()["$defs"]["MeetingType"]["properties"]["duration"]
    assert [{"type": "number"}, {"type": "null"}] == duration["anyOf"]


def app() -> FastAPI:
    """Return an app whose routes take and return models."""
    application = FastAPI()

    @application.get("/meetings")
    async def meetings() -> list[Meeting]:
        return [from_wire(sample("meeting_public"), Meeting), from_wire(ODD, Meeting)]

    @application.post("/hooks")
    async def hooks(hook: Annotated[Hook, Body()]) -> Briefing:
        return Briefing(meeting=Meeting(id=hook.id, extra={"seen": hook.target_url}))

    return application


def test_routes() -> None:
    """A body is read as a model, a model is returned in the wire format, and an invalid body is a 422."""
    client = TestClient(app())
    assert [sample("meeting_public"), ODD] == client.get("/meetings").json()
    response = client.post("/hooks", json=sample("hook"))
    meeting = {"_id": sample("hook")["_id"], "seen": sample("hook")["targetUrl"]}
    assert (200, {"meeting": meeting, "types": [], "owner": None}) == (response.status_code, response.json())
    refused = client.post("/hooks", json={"_id": 7})
    assert (422, "_id: expected a string, got int") == (
        refused.status_code,
        refused.json()["detail"][0]["msg"],
    )


def test_openapi() -> None:
    """Routes refer to the models by name, and the fields have descriptions."""
    document = app().openapi()
    content = document["paths"]["/meetings"]["get"]["responses"]["200"]["content"]["application/json"]
    assert {"$ref": "#/components/schemas/Meeting"} == content["schema"]["items"]
    body = document["paths"]["/hooks"]["post"]["requestBody"]["content"]["application/json"]
    assert {"$ref": "#/components/schemas/Hook"} == body["schema"]
    start = document["components"]["schemas"]["Meeting"]["properties"]["start"]
    assert "When the meeting starts." == start["description"]


def test_pydantic_is_imported_lazily() -> None:
    """The models and the codec do not import pydantic themselves."""
    code = (
        "import sys; from lemcal_async import Meeting, from_wire, to_wire;"
        "to_wire(from_wire({'_id': 'm'}, Meeting)); assert 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
