"""What a change set would do, as CloudFormation describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Change:
    """One resource that is added, modified or removed."""

    action: str
    """Add, Modify, Remove, Import or Dynamic."""
    resource: str
    """Its name in the template."""
    kind: str
    """Its type, such as AWS::S3::Bucket."""
    replaced: Literal["no", "maybe", "yes"] = "no"
    """Whether a modified resource is made anew, and what it holds is lost."""

    @classmethod
    def parse(cls, described: Mapping[str, Any]) -> Change:
        """From the `ResourceChange` of DescribeChangeSet."""
        replaced: Literal["no", "maybe", "yes"] = "no"
        match described.get("Replacement"):
            case "True":
                replaced = "yes"
            case "Conditional":
                replaced = "maybe"
        return cls(described["Action"], described["LogicalResourceId"], described["ResourceType"], replaced)


@dataclass(frozen=True, slots=True)
class Plan:
    """A change set that waits to be executed or discarded. Without changes there is none."""

    creates: bool
    """Whether the stack is made by it."""
    changes: tuple[Change, ...]
    change_set: str | None
    """ARN; None if nothing would change."""
