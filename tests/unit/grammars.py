"""Grammars as people write them, and schemas as servers get them."""

from __future__ import annotations

import json
from typing import Any

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""

C = r"""
root ::= (declaration)*
declaration ::= dataType identifier "(" parameter? ")" "{" statement* "}"
dataType  ::= "int" ws | "float" ws | "char" ws
identifier ::= [a-zA-Z_] [a-zA-Z_0-9]*
parameter ::= dataType identifier
statement ::=
    ( dataType identifier ws "=" ws expression ";" ) |
    ( identifier ws "=" ws expression ";" ) |
    ( identifier ws "(" argList? ")" ";" ) |
    ( "return" ws expression ";" ) |
    ( "while" "(" condition ")" "{" statement* "}" ) |
    ( "if" "(" condition ")" "{" statement* "}" ("else" "{" statement* "}")? ) |
    ( "//" [^\n]* "\n" ) |
    ( "/*" ( [^*] | ("*" [^/]) )* "*/" )
condition ::= expression ("<=" | "<" | "==" | "!=" | ">=" | ">") expression
expression ::= term (("+" | "-") term)*
term ::= factor (("*" | "/") factor)*
factor ::= identifier | [0-9]+ | "-" factor | identifier "(" argList? ")" | "(" ws expression ws ")"
argList ::= expression ("," ws expression)*
ws ::= ([ \t\n]+)
"""

ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""

CHESS = r"""
root    ::= "1. " move " " move "\n" ([1-9] [0-9]? ". " move " " move "\n")+
move    ::= (pawn | nonpawn | castle) [+#]?
nonpawn ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
pawn    ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
castle  ::= "O-O" "-O"?
"""

JAPANESE = r"""
root    ::= jp-char+ ([ \t\n] jp-char+)*
jp-char ::= [ぁ-ゟ] | [ァ-ヿ] | [、-〾] | [一-鿿]
"""

SPACES_BETWEEN = r"""
root ::= (line | ws)*
line ::= [a-z]+ ws "\n" ws
ws   ::= sp*
sp   ::= " " | "\t"
"""
"""Begins with itself, but only at the end of what it repeats: llama.cpp takes it."""

TEXTS = {
    "json": JSON,
    "c": C,
    "arithmetic": ARITHMETIC,
    "chess": CHESS,
    "japanese": JAPANESE,
    "spaces between": SPACES_BETWEEN,
}


def optional(n: int) -> dict[str, Any]:
    types = ("string", "integer", "null", "boolean")
    return {"type": "object", "properties": {f"property_{i}": {"type": types[i % 4]} for i in range(n)}}


def nested(depth: int) -> dict[str, Any]:
    inner = nested(depth - 1) if depth else {"type": "string"}
    return {"type": "object", "properties": {f"p{i}": inner for i in range(5)}}


SCHEMAS: dict[str, Any] = {
    "60 optional properties": optional(60),
    "200 optional properties": optional(200),
    "nested": nested(3),
    "other properties": {**optional(5), "additionalProperties": {"type": "string"}},
    "any of 20 objects": {"anyOf": [optional(8) for _ in range(20)]},
    "up to 100 objects": {"type": "array", "items": optional(5), "maxItems": 100},
    "2 to 1000 numbers": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 1000},
    "a long text": {"type": "string", "minLength": 3, "maxLength": 1500},
    "a range": {"type": "integer", "minimum": -12345, "maximum": 9876543},
    "a pattern": {"type": "string", "pattern": "^[a-z0-9._%+-]{0,64}@[a-z0-9.-]{1,255}\\.[a-z]{2,10}$"},
    "a date": {"type": "object", "properties": {"d": {"type": "string", "format": "date-time"}}},
    "one of 500": {"enum": [f"value number {i}" for i in range(500)]},
    "anything": {},
    "a tree": json.loads(
        '{"$defs": {"n": {"type": "object", "properties": {"l": {"$ref": "#/$defs/n"}, "r": {"$ref": "#/$defs/n"}}}},'
        ' "$ref": "#/$defs/n"}'
    ),
}


def ambiguous(depth: int) -> str:
    """A grammar that can be read in very many ways: each rule is twice the next, and the last may be empty."""
    rules = [f"a{i} ::= a{i + 1} a{i + 1}" for i in range(depth)]
    return "\n".join(["root ::= a0", *rules, f'a{depth} ::= "x"?'])
