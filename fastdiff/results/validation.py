"""Values that were read from a file, held against the shape that they must have."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fastdiff.errors import InputError

T = TypeVar("T", bound=BaseModel)


def validated(model: type[T], value: Any, where: object, remedy: str) -> T:
    """Read a value as a model.

    Args:
        model: The shape.
        value: What the file holds.
        where: The file, and the line if it has many values.
        remedy: What to do about a value of another shape.

    Raises:
        InputError: It has another shape; one line that names the place, the first field that does not fit, and the
            remedy.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: {field}: {first['msg']}; {remedy}") from error
