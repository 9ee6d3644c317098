"""Every way for a request to fail has its next step."""

from __future__ import annotations

import dataclasses

import pytest

from agent import causes
from agent.bpf.manifest import Reason
from tests.unit.agent.test_trace import RECORD


@pytest.mark.parametrize(
    ("code", "details", "said"),
    [
        (429, "local_rate_limited", "rateLimits"),
        (429, "rate_limit_quota", "global rate limit"),
        (401, "jwt_authn_access_denied{Jwt_is_missing}", "has no token"),
        (401, "jwt_authn_access_denied{Jwt_is_expired}", "token was not accepted"),
        (404, "route_not_found", "no route"),
        (503, "upstream_reset_before_response_started{connection_timeout}", "in time"),
        (
            503,
            "upstream_reset_before_response_started{remote_connection_failure|delayed_connect_error:_Connection_refused}",
            "is it listening",
        ),
        (503, "upstream_reset_before_response_started{overflow}", "limits"),
        (503, "upstream_reset_before_response_started{connection_termination}", "closed the connection before it answered"),
        (502, "upstream_reset_before_response_started{protocol_error}", "what the backend said is not HTTP"),
        (400, "http1.codec_error", "what the caller said is not HTTP"),
        (504, "upstream_response_timeout", "timeouts of the route"),
        (418, "fault_filter_abort", "a fault"),
    ],
)
def test_an_answer_of_the_waypoint_has_a_next_step(code: int, details: str, said: str) -> None:
    record = dataclasses.replace(RECORD, response_code=code, response_code_details=details)
    assert said in str(causes.of_response(record, None, None))


def test_an_answer_of_the_application_has_none() -> None:
    assert causes.of_response(dataclasses.replace(RECORD, response_code=503), 1, None) is None


@pytest.mark.parametrize(
    ("endpoints", "said"), [(0, "no endpoint is ready"), (None, "no endpoint is ready"), (3, "all of the 3 ready endpoints are ejected")]
)
def test_endpoints_that_are_ejected_are_told_from_none(endpoints: int | None, said: str) -> None:
    record = dataclasses.replace(
        RECORD, response_code=503, response_code_details="no_healthy_upstream", response_flags=("no healthy upstream",)
    )
    assert said in str(causes.of_response(record, endpoints, None))


BROKEN = "TLS_error:|5:error:00000000:Broken_pipe:TLS_error_end"


@pytest.mark.parametrize(
    ("failure", "certified", "said"),
    [
        (BROKEN, True, "the two ends did not agree on TLS"),
        (BROKEN, False, "the caller has no certificate that is valid"),
        (
            "TLS_error:|268435581:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: certificate has expired",
            False,
            "the receiver's certificate",
        ),
        ("TLS error: Secret is not supplied by SDS", True, "the caller has no certificate that is valid"),
        ("delayed_connect_error:_Connection_refused", False, None),
    ],
)
def test_a_handshake_that_broke_off_without_an_alert_is_explained_by_ones_own_certificate(
    failure: str, certified: bool, said: str | None
) -> None:
    step = causes.of_failure(failure, certified=lambda: certified)
    assert (step is None) if said is None else said in str(step)
    if step is not None:
        record = dataclasses.replace(RECORD, response_code=503, response_code_details="upstream_reset", failure=failure)
        assert causes.of_response(record, 1, None, certified=lambda: certified) == step


@pytest.mark.parametrize(
    ("rule", "of_connection", "of_request"),
    [
        pytest.param(
            "shop/p: no rule matches",
            "allow the caller in AuthorizationPolicy shop/p, or call as another service account",
            "allow the request in AuthorizationPolicy shop/p, or send another",
            id="no-rule-allows-it",
        ),
        pytest.param(
            "shop/(default-deny), shop/p, shop/q: no rule matches",
            "allow the caller in one of the AuthorizationPolicies shop/p, shop/q, or call as another service account",
            "allow the request in one of the AuthorizationPolicies shop/p, shop/q, or send another",
            id="none-of-several",
        ),
        pytest.param(
            "shop/(default-deny): no rule matches",
            "namespace shop denies by default (meshagent.io/default-policy: deny): "
            "allow the caller in an AuthorizationPolicy there, or call as another service account",
            "namespace shop denies by default (meshagent.io/default-policy: deny): "
            "allow the request in an AuthorizationPolicy there, or send another",
            id="the-namespace-denies",
        ),
        pytest.param(
            "shop/p[7]",
            "a DENY comes before every ALLOW: narrow rule shop/p[7], or call as another service account",
            "a DENY comes before every ALLOW: narrow rule shop/p[7], or send another",
            id="a-rule-denies-it",
        ),
    ],
)
def test_what_a_policy_refused_names_the_policy_and_what_would_help(rule: str, of_connection: str, of_request: str) -> None:
    assert causes.of_denial(Reason.POLICY, rule) == of_connection
    record = dataclasses.replace(RECORD, response_code=403, response_code_details="rbac_access_denied_matched_policy[x]")
    assert causes.of_response(record, 1, rule) == of_request


def test_a_policy_that_demands_a_token_is_said_to() -> None:
    record = dataclasses.replace(RECORD, response_code=403, response_code_details="rbac_access_denied_matched_policy[none]")
    assert "token" in str(causes.of_response(record, 1, "default/p: no rule matches", tokens=True))
