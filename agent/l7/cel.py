"""Expressions of CEL, parsed as Envoy's matchers and samplers want them. Used by `agent.l7.limits` and `agent.l7.spans`.

https://github.com/google/cel-spec/blob/master/doc/langdef.md; what can be asked of a request:
https://www.envoyproxy.io/docs/envoy/v1.40.0/intro/arch_overview/advanced/attributes.
"""

from __future__ import annotations

from collections.abc import Sequence

from cel.expr import syntax_pb2
from cel.expr.syntax_pb2 import Expr
from xds.type.v3 import cel_pb2


def attribute(name: str) -> Expr:
    """One of Envoy's attributes; what comes after a dot is a field of it."""
    first, *fields = name.split(".")
    result = Expr(ident_expr={"name": first})
    for field in fields:
        result = Expr(select_expr={"operand": result, "field": field})
    return result


def entry(of: Expr, key: str) -> Expr:
    """The value of a map at a key; where there is none the whole expression fails, which Envoy takes for false."""
    return call("_[_]", of, Expr(const_expr={"string_value": key}))


def equals(one: Expr, value: str | bytes) -> Expr:
    """Is it this value? Filter state is bytes, all else text."""
    constant = {"bytes_value": value} if isinstance(value, bytes) else {"string_value": value}
    return call("_==_", one, Expr(const_expr=constant))


def join(function: str, parts: Sequence[Expr]) -> Expr:
    """`_||_` or `_&&_` of at least one. Balanced: 1,024 callers are ten levels deep and not a thousand."""
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    return call(function, join(function, parts[:middle]), join(function, parts[middle:]))


def call(function: str, *arguments: Expr) -> Expr:
    """An operator or function of CEL."""
    return Expr(call_expr=Expr.Call(function=function, args=arguments))


def parsed(expression: Expr) -> cel_pb2.CelExpression:
    """Give every part the number of its own that CEL asks for."""
    waiting, number = [expression], 0
    while waiting:
        number += 1
        part = waiting.pop()
        part.id = number
        waiting.extend(part.call_expr.args)
        if part.HasField("select_expr"):
            waiting.append(part.select_expr.operand)
    return cel_pb2.CelExpression(cel_expr_parsed=syntax_pb2.ParsedExpr(expr=expression, source_info=syntax_pb2.SourceInfo()))
