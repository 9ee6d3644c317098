"""An agent of this node, or what one has left: what it says of itself, and what the kernel says of its programs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from agent.bpf import attached
from agent.check.finding import Finding, error, ok, some, warning
from agent.config import Config
from meshapi.text import counted

_OVERDUE: Final = 0.5
"""Of the time between the moment at which a certificate is to be renewed and its end: then it has missed several attempts."""
_LATE: Final = 1 / 8
"""Of an authority's life. What was signed by one that is replaced after two thirds of its life has been renewed when less than this is left. That is when
cert-manager replaces it (https://cert-manager.io/docs/usage/certificate/#reissuance-triggered-by-expiry-renewal)."""


def left_behind(config: Config) -> Iterator[Finding]:
    """Programs in force without an agent that answers."""
    yield from redirect(config)
    yield error(
        "agent", "programs are in force, and no agent answers", str(config.pin_dir),
        cause="the agent was stopped or is starting, or it has another --run-dir; traffic goes on as it was configured last",
        next_step="start 'meshagent run' again, or remove everything with 'meshagent uninstall'",
    )  # fmt: skip


def redirect(config: Config) -> Iterator[Finding]:
    """Programs that do not run where they belong."""
    drifted = attached.drifted(config)
    for one in drifted:
        yield error(
            "redirect drift", f"{one.name} does not run for {one.place}", str(config.pin_dir / "links" / one.name), cause=one.why,
            next_step="restart the agent: it attaches what is missing, and no connection is lost",
        )  # fmt: skip
    if not drifted:
        yield ok("redirect drift", "every program runs where it was attached", str(config.cgroup))


def findings(
    config: Config, status: Mapping[str, Any], identity: Mapping[str, Any], *, version: str, now: float | None = None
) -> Iterator[Finding]:
    """Everything that can be said of an agent that answers with these documents (`agent.report.Status`, `IdentityStatus`)."""
    yield from redirect(config)
    yield from agent(status, version)
    yield from envoy(status["waypoint"])
    yield from controller(status["controller"])
    yield from certificates(identity, time.time() if now is None else now)
    for problem in status["problems"]:
        said, _, step = problem.partition(": ")
        yield warning("problems", said, next_step=step or "look at the agent's log")


def agent(status: Mapping[str, Any], version: str) -> Iterator[Finding]:
    """Ready, of this version, and all workloads redirected."""
    own = status.get("version", "")
    if own != version:
        yield warning(
            "version", f"the agent is {own or 'older than 0.1'}, this command {version}", status["node"], cause="one of both was upgraded alone",
            next_step="restart the agent with this version after 'meshagent upgrade-check', or use the command of its own",
        )  # fmt: skip
    if not status["ready"]:
        yield error("agent", f"agent {status['node']} is not ready", next_step="see what is said of problems and drift, and its log")
    elif own == version:
        yield ok("agent", f"agent {status['node']} is ready and of this version, {own}")
    drifted = [f"{w['namespace']}/{w['name']}" for w in status["workloads"] if w.get("drift")]
    if drifted:
        yield error(
            "redirect drift", f"{len(drifted)} workloads are not redirected, or only in part: {some(drifted)}", status["node"],
            cause="see problems: each says why", next_step="do what is said there; until then policy may not hold for them",
        )  # fmt: skip
    if status["probe"]["works"] is False:
        yield error(
            "live probe",
            "the kernel programs let through what they have to refuse",
            status["node"],
            next_step="see problems; restart the agent",
        )


def envoy(waypoint: Mapping[str, Any]) -> Iterator[Finding]:
    """Up, and with the configuration it was given."""
    if not waypoint["ready"]:
        yield error(
            "waypoint", "Envoy is not ready", cause="it is starting, or dies again and again",
            next_step="see envoy.log in the run directory; until then L7 connections are refused",
        )  # fmt: skip
    elif waypoint.get("rejected"):
        yield error(
            "waypoint", f"Envoy refuses {waypoint['rejected']} resources and goes on with older ones", cause=waypoint.get("lastNack", ""),
            next_step="undo the last change of the resource that is named, and report it: what Envoy refuses should have been refused before",
        )  # fmt: skip
    else:
        yield ok("waypoint", f"Envoy {waypoint['version']} is ready and has what it was sent")


def controller(said: Mapping[str, Any]) -> Iterator[Finding]:
    """Connected, and something came from it."""
    if not said["connected"]:
        yield error(
            "controller", "the agent is not connected to its controller", cause="the controller is down, or a firewall or NetworkPolicy is between them",
            next_step="look at the controller's log and at port 15010; until then the last good configuration stays, and certificates run out",
        )  # fmt: skip
    elif not said["version"]:
        yield warning(
            "controller",
            "connected, but no configuration has come",
            next_step="see whether the controller is ready: it may still read its source",
        )
    else:
        lag = "" if said["lagSeconds"] is None else f"; the last change was in force after {said['lagSeconds']:.3f} s"
        yield ok("controller", f"connected, version {said['version']} is in force{lag}")


def certificates(identity: Mapping[str, Any], now: float) -> Iterator[Finding]:
    """Those of the node and of its workloads: there, in time, and renewed when they should be."""
    if identity["mode"] == "off":
        yield ok("certificates", "there are none: the controller has no certificate authority, or is reached over a unix socket")
        return
    held = [*([identity["node"]] if identity["node"] else []), *identity["workloads"]]
    found = [(one, _certificate(one, one["workload"] or "this node", now)) for one in held]
    bad = [finding for _, finding in found if finding]
    bad += _authority([one for one, finding in found if not finding], now)
    yield from bad
    if held and not bad:
        first = min(one["expiresAt"] for one in held)
        yield ok(
            "certificates",
            f"{counted(len(held), 'is', 'are')} in time; the first ends in {(first - now) / 3600:.1f} h and is renewed before",
        )
    elif not held:
        yield ok("certificates", "there are no workloads with an identity here")


def _authority(held: Sequence[Mapping[str, Any]], now: float) -> Iterator[Finding]:
    """At most one: the newest authority that signed certificates which are well ends, they end with it, and it should have been replaced by now."""
    signed = [one for one in held if one.get("authorityBeginsAt") is not None]
    if not signed:
        return
    newest = max(signed, key=lambda one: one["authorityBeginsAt"])
    begins, ends = newest["authorityBeginsAt"], newest["authorityEndsAt"]
    if ends - now < (ends - begins) * _LATE and any(one["expiresAt"] == ends for one in held):
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ends))
        yield warning(
            "certificates", f"what signs them ends on {when}, in {(ends - now) / 3600:.1f} h, and they with it", newest["authority"],
            cause="who replaces it in time (cert-manager, at two thirds of its life, or people) has not done so, or controllers have not got the next one",
            next_step="of a self-made root: 'mesh-controller ca rotate'; otherwise put the next one in place (Secret meshagent-ca, --ca-cert and --ca-key, or "
            "what --ca-command signs with): controllers take it up, and agents renew at half of what is left",
        )  # fmt: skip


def _certificate(one: Mapping[str, Any], who: str, now: float) -> Finding | None:
    begins, ends, problem = one["notBefore"], one["expiresAt"], one["problem"]
    if ends is None:
        return error(
            "certificates", f"{who} has none", one["spiffeId"], cause=problem, next_step="see the controller's log: it decides who gets one"
        )
    if now >= ends:
        return error(
            "certificates", f"that of {who} ended {(now - ends) / 3600:.1f} h ago", one["spiffeId"], cause=problem or "it could not be renewed",
            next_step="see whether the agent reaches the controller, and whether the clocks of both agree",
        )  # fmt: skip
    if begins is not None and now < begins:
        return error(
            "certificates", f"that of {who} begins in {begins - now:.0f} s", one["spiffeId"], cause="this node's clock is behind the controller's",
            next_step="set the clock (chrony, systemd-timesyncd)",
        )  # fmt: skip
    renews = one["renewsAt"]
    if problem or (renews is not None and now > renews + (ends - renews) * _OVERDUE):
        return warning(
            "certificates", f"that of {who} is not renewed; it ends in {(ends - now) / 3600:.1f} h", one["spiffeId"],
            cause=problem or "it should have been by now: that is tried at half of its life, and again until it ends",
            next_step="see whether the agent reaches the controller, and the controller's log",
        )  # fmt: skip
    return None
