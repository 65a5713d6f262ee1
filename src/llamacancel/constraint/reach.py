"""What the parts of a schema come to once references are followed and parts that hold together are merged.

llguidance follows references with its stack, and merges what stands side by side (members of `allOf`, keywords beside
`anyOf`, `oneOf` or `$ref`) by multiplying it out. Both are bounded here, in linear time and without recursion.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

__all__ = ["Part", "check_reach"]

DEEPEST = 400  # schemas within each other and through `$ref`: of a stack of 8 MiB 1,200 take all
MOST_ALTERNATIVES = 100  # at one place: each step follows all; 117 ms a step with 300
MOST_COPIES = 1_000  # properties, once for each alternative: 100 with 100 take 3.6 s
MOST_OPTIONAL = 500  # properties of one object that may be left out: each may be next, 20 ms a mask; 110 ms with 1,000
MOST_PAIRS = 5_000  # of values in `enum` that are compared: 40,000 take 4 s
MOST_PATTERNS_AT_ONCE = 8  # for one text: 16 take 0.2 s, 30 take all memory
LARGEST_MULTIPLE = 30_030  # of multipleOf, multiplied where several hold at once: 0.2 s, a million takes 7 s
MOST_EXPANDED = 1_000  # schemas, references replaced, where properties of the same name are merged


@dataclass
class Part:
    """A schema within a schema: where it stands, and what it comes to together with what is merged into it."""

    schema: dict[str, Any]
    within: int  # the number of the part around it
    keyword: str  # what makes it a part of that
    height: int = 1  # schemas within each other, references not followed
    depth: int = 1  # the same, references followed
    expanded: int = 1  # schemas, references replaced
    alternatives: int = 1
    values: int = 1  # alternatives, each value of `enum` one
    several: int = 0  # how many of what is merged have several of these
    width: int = 0  # properties of one alternative
    optional: int = 0  # those of them that may be left out
    wide: int = 0  # how many of what is merged have properties
    patterns: int = 0  # that one text has to match
    multiple: int = 1  # that a number has to be one of; what stands behind the point moved before it
    choice: dict[str, list[int]] = field(default_factory=dict)  # these six of anyOf, oneOf

    def take_in(self, part: Part, keyword: str) -> None:
        """What another part, which is complete, adds to this one."""
        self.depth = max(self.depth, part.depth + 1)
        self.expanded = min(self.expanded + part.expanded, 10**9)
        if keyword in ("anyOf", "oneOf"):
            choice = self.choice.setdefault(keyword, [0, 0, 0, 0, 0, 1])
            choice[:] = (
                choice[0] + part.alternatives,
                choice[1] + part.values,
                max(choice[2], part.width),
                max(choice[3], part.optional),
                max(choice[4], part.patterns),
                max(choice[5], part.multiple),
            )
        elif keyword in ("allOf", "$ref"):
            self._merge(part.alternatives, part.values, part.width, part.optional, part.patterns, part.multiple)

    def complete(self) -> None:
        """Called once all of its parts are taken in."""
        for choice in self.choice.values():
            self._merge(*choice)
        values = self.schema.get("enum")
        properties, required = self.schema.get("properties"), self.schema.get("required")
        names = set(properties) if isinstance(properties, dict) else set()
        needed = {name for name in required if isinstance(name, str)} if isinstance(required, (list, tuple)) else set()
        self._merge(
            1,
            len(values) if isinstance(values, (list, tuple)) else 1,
            len(names),
            len(names - needed),
            int("pattern" in self.schema) + int("format" in self.schema),
            _multiple(self.schema),
        )

    def _merge(self, alternatives: int, values: int, width: int, optional: int, patterns: int, multiple: int) -> None:
        self.alternatives = min(self.alternatives * alternatives, 10**9)
        self.values = min(self.values * values, 10**9)
        self.several += values > 1
        self.width += width
        self.wide += width > 0
        self.optional = min(self.optional + optional, 10**9)
        self.patterns += patterns
        self.multiple = min(self.multiple * multiple, 10**18)

    def check(self) -> None:
        """Raises ValueError if it is out of bounds."""
        if self.alternatives > MOST_ALTERNATIVES:
            _refuse(f"{self.alternatives} alternatives at one place", MOST_ALTERNATIVES)
        if self.alternatives > 1 and self.alternatives * self.width > MOST_COPIES:
            _refuse(f"{self.width} properties in each of {self.alternatives} alternatives", MOST_COPIES)
        if self.optional > MOST_OPTIONAL:
            _refuse(f"{self.optional} properties of one object that may be left out", MOST_OPTIONAL)
        if self.several > 1 and self.values > MOST_PAIRS:
            _refuse(f"{self.values} pairs of values that are compared", MOST_PAIRS)
        if self.patterns > MOST_PATTERNS_AT_ONCE:
            _refuse(f"{self.patterns} patterns for one text", MOST_PATTERNS_AT_ONCE)
        if self.multiple > LARGEST_MULTIPLE:
            _refuse(f"'multipleOf' of {self.multiple} in all for one number", LARGEST_MULTIPLE)


def check_reach(parts: list[Part], references: list[tuple[int, str]], one_base: bool) -> None:
    """Raises ValueError if the parts come to more than the bounds.

    Args:
        parts: Each behind the one that it is within; the whole schema first.
        references: Number of the part that each is in, and what it names.
        one_base: References all begin at the root; otherwise, each may lead anywhere.
    """
    needs = [0] * len(parts)  # parts and references that are not complete yet
    needed_by: list[list[tuple[int, str]]] = [[] for _ in parts]
    for number in range(len(parts) - 1, 0, -1):
        part = parts[number]
        parts[part.within].height = max(parts[part.within].height, part.height + 1)
        needs[part.within] += 1
        needed_by[number].append((part.within, part.keyword))
    numbers = {id(part.schema): number for number, part in enumerate(parts)}
    targets: dict[Any, int] = {}  # a reference that is written in two ways is followed twice
    for i, (number, reference) in enumerate(references):
        leads = numbers.get(id(_target(parts[0].schema, reference)), 0) if one_base else 0
        targets[reference if one_base else i] = leads
        needs[number] += 1
        needed_by[leads].append((number, "$ref"))
    complete = [number for number, n in enumerate(needs) if n == 0]
    for number in complete:  # grows meanwhile
        parts[number].complete()
        for above, keyword in needed_by[number]:
            parts[above].take_in(parts[number], keyword)
            needs[above] -= 1
            if needs[above] == 0:
                complete.append(above)
    depth = parts[0].depth
    if needs[0]:  # of what is in circles, all may follow each other
        depth = parts[0].height + sum(parts[leads].height for leads in targets.values() if needs[leads])
        depth += max((parts[number].depth for number in complete), default=0)
        for number in range(len(parts) - 1, -1, -1):
            if needs[number]:
                parts[number].complete()
                if number:
                    parts[parts[number].within].take_in(parts[number], parts[number].keyword)
    if depth > DEEPEST:
        _refuse(f"up to {depth} levels through its references", DEEPEST)
    for part in parts:
        part.check()
    if any(part.wide > 1 for part in parts):  # properties of the same name are merged, and what they refer to
        if parts[0].expanded > MOST_EXPANDED:
            _refuse("properties that are merged, and with what they refer to too many parts", MOST_EXPANDED)
        patterns = sum("pattern" in part.schema for part in parts)
        if patterns > 2 * MOST_PATTERNS_AT_ONCE:
            _refuse(f"properties that are merged, and {patterns} patterns", 2 * MOST_PATTERNS_AT_ONCE)
        multiple = 1
        for several in {_multiple(part.schema) for part in parts}:
            multiple = min(multiple * several, 10**18)
        if multiple > LARGEST_MULTIPLE:
            _refuse(f"properties that are merged, and 'multipleOf' of {multiple} in all", LARGEST_MULTIPLE)
        sizes = sorted(len(e) for part in parts if isinstance(e := part.schema.get("enum"), (list, tuple)))
        if len(sizes) > 1 and sizes[-1] * sizes[-2] > MOST_PAIRS:
            _refuse(f"properties that are merged, and {sizes[-1] * sizes[-2]} pairs of values to compare", MOST_PAIRS)


def _refuse(what: str, most: int) -> None:
    raise ValueError(f"the schema has {what}; at most {most} can be followed")


def _multiple(schema: dict[str, Any]) -> int:
    """`multipleOf` of a schema as a whole number: its digits, without the point; 1 without one."""
    value = schema.get("multipleOf")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value:
        return 1
    _, digits, exponent = Decimal(str(value)).normalize().as_tuple()
    scale: int = 10 ** max(int(exponent), 0)
    return int("".join(map(str, digits))) * scale


def _target(root: Any, reference: str) -> Any:
    """What a reference within the schema names; None if it is not known."""
    if not reference.startswith("#"):
        return None
    value = root
    for part in unquote(reference[1:]).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, (list, tuple)) and name.isdigit() and len(name) < 6 and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value
