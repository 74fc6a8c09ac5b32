"""What clients ask for that has one right shape, so that a model that knows little can give it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

City = Literal["Bonn", "Ulm"]
CITIES = ("Bonn", "Ulm")


class River(BaseModel):
    """A river."""

    name: Literal["Rhine", "Danube"]
    length_km: int = Field(ge=1, le=9999)


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": list(CITIES)}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
