"""`kubectl meshagent …`: the command as a kubectl plugin (https://kubernetes.io/docs/tasks/extend-kubectl/kubectl-plugins/).

`check` looks at the cluster from here, and with --all-nodes at every node too (`agent.cli.everynode`). What asks a node's agent runs in that agent's pod: this
finds the pod, and becomes `kubectl exec`, so that exit status, signals and terminal are kubectl's business. Arguments are passed on as a list; there is no
shell on the way.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click
from click.shell_completion import ShellComplete

from agent.cli import observe, policy, resources
from agent.cli.check import MESH_NAMESPACE, check
from agent.cli.identity import show_one
from agent.cli.main import failures
from agent.cli.main import main as meshagent
from agent.errors import MeshError, NotFound

if TYPE_CHECKING:
    from agent.check.api import Api

IN_AGENTS: Final = ("graph", "identity", "policy", "status", "trace", "upgrade-check")
"""Commands that need a node's agent."""
_HERE: Final = ("completion",)
_INSTEAD: Final = {
    **dict.fromkeys(("apply", "delete", "get"), "in a cluster, resources are objects of Kubernetes: use kubectl {0} itself"),
    **dict.fromkeys(("run", "uninstall"), "the chart's DaemonSet runs agents: use helm or kubectl apply; on a node, use meshagent {0}"),
}
_FLAGS: Final = {
    "--context": "context",
    "--kubeconfig": "kubeconfig",
    "--namespace": "namespace",
    "-n": "namespace",
    "--node": "node",
    "--mesh-namespace": "mesh",
    "--all-nodes": "all_nodes",
}
_HELP: Final = """Usage: kubectl meshagent [FLAGS] COMMAND [ARGS]...

  A service mesh without sidecars. 'check' looks at the cluster; these run in an agent's pod: {commands}.

Flags (anywhere):
  --node NAME            Which node's agent; without it, the source's (trace) or the only one. With 'check': check that node.
  --all-nodes            With 'check': check every node that has an agent, after the cluster.
  -n, --namespace NAME   Namespace of workloads that are named without one.  [default: the context's]
  --mesh-namespace NAME  Where the mesh is installed.  [default: meshagent-system]
  --kubeconfig FILE, --context NAME
                         As for kubectl.

'kubectl meshagent COMMAND --help' explains a command."""


@dataclass
class Given:
    """Flags of kubectl and of this plugin, and the rest of the command line."""

    context: str = ""
    kubeconfig: str = ""
    namespace: str = ""
    node: str = ""
    mesh: str = MESH_NAMESPACE
    all_nodes: bool = False
    rest: list[str] = field(default_factory=list)

    @property
    def connection(self) -> list[str]:
        """What kubectl is to be told."""
        return [
            *(["--kubeconfig", self.kubeconfig] if self.kubeconfig else []),
            *(["--context", self.context] if self.context else []),
        ]


def parse(arguments: Sequence[str]) -> Given:
    """Take flags of kubectl out of a command line, wherever they are before "--". Raises click.UsageError for one without its value."""
    given = Given()
    left = list(arguments)
    while left:
        word = left.pop(0)
        if word == "--":
            given.rest += [word, *left]
            break
        name, separator, value = word.partition("=")
        if name.startswith("-n") and len(word) > 2 and not separator:  # -nNAME, as pflag has it
            name, value = "-n", word[2:]
        if name not in _FLAGS:
            given.rest.append(word)
            continue
        if isinstance(getattr(given, _FLAGS[name]), bool):
            if separator:
                raise click.UsageError(f"{name} takes no value")
            setattr(given, _FLAGS[name], True)
            continue
        if not value:
            if separator or not left:
                raise click.UsageError(f"{name} needs a value")
            value = left.pop(0)
        setattr(given, _FLAGS[name], value)
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the plugin."""
    try:
        with failures():
            _run(parse(sys.argv[1:] if arguments is None else arguments))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)


def complete() -> None:
    """Answer kubectl's completion (`kubectl_complete-meshagent`): a word a line, then a directive of cobra, 4 being "no file names"."""
    *before, word = sys.argv[1:] or [""]
    try:
        given = parse(before)
    except click.UsageError:  # a flag of kubectl, whose value is wanted
        click.echo(":0")
        return
    items = ShellComplete(meshagent, {}, "meshagent", "_MESHAGENT_COMPLETE").get_completions(given.rest, word)
    for item in items:
        if item.type == "plain" and item.value not in _INSTEAD:
            click.echo(f"{item.value}\t{item.help}" if item.help else item.value)
    click.echo(":0" if any(item.type != "plain" for item in items) else ":4")


def _run(given: Given) -> NoReturn:
    command = given.rest[0] if given.rest else "--help"
    if command in {"-h", "--help"}:
        click.echo(_HELP.format(commands=", ".join(IN_AGENTS)))
        sys.exit(0)
    if command in _INSTEAD:
        raise click.UsageError(_INSTEAD[command].format(command))
    asks_for_help = bool({"-h", "--help"} & set(given.rest))
    if given.all_nodes and (command != "check" or given.node):
        raise click.UsageError("--all-nodes is for 'check'" if command != "check" else "--node and --all-nodes exclude each other")
    of_nodes = command == "check" and bool(given.node or given.all_nodes) and not asks_for_help
    if of_nodes and _parsed(check, given.rest[1:]).get("kubernetes"):
        raise click.UsageError("--kubernetes looks at the cluster and not at nodes: leave it out, or --node and --all-nodes")
    if given.all_nodes and not asks_for_help:
        sys.exit(_check_all(given))
    if command == "check" and not given.node and not asks_for_help:
        meshagent(["check", "--kubernetes", *given.connection, "--namespace", given.mesh, *given.rest[1:]], prog_name="kubectl meshagent")
    if command not in {*IN_AGENTS, "check"} or asks_for_help:
        meshagent(given.rest, prog_name="kubectl meshagent")
    _exec(given, command)


def _check_all(given: Given) -> int:
    """Check the cluster and every node; return the exit status."""
    options = given.rest[1:]
    output = str(check.make_context("check", list(options)).params["output"])
    from agent.check import cluster  # noqa: PLC0415  completion and help do without
    from agent.check.api import Api  # noqa: PLC0415
    from agent.cli import everynode  # noqa: PLC0415

    file = Path(given.kubeconfig) if given.kubeconfig else None
    found = [cluster.check(file, given.context, given.mesh, importlib.metadata.version("meshagent"))]
    try:
        agents = _agents(Api.connect(file, given.context), given)
        found += everynode.reports(["kubectl", *given.connection], given.mesh, agents, options)
    except MeshError as failure:  # what was found of the cluster may say why
        found.append(everynode.unseen(str(failure), given.mesh))
    return everynode.say(found, output)


def _exec(given: Given, command: str) -> NoReturn:
    """Become `kubectl exec` of the command in the right pod."""
    from agent.check.api import Api  # noqa: PLC0415  completion and help do without

    api = Api.connect(Path(given.kubeconfig) if given.kubeconfig else None, given.context)
    options, source, namespace = list(given.rest), "", given.namespace or api.namespace
    if command == "trace":
        source = str(_parsed(observe.trace, options[1:]).get("source") or "")
        options[1:1] = ["-n", namespace]  # not at the end, where "--" may be before it
    elif options[:2] == ["identity", "show"]:
        source = str(_parsed(show_one, options[2:]).get("workload") or "")
        options[2:2] = ["-n", namespace]
    elif command == "graph" and given.namespace:
        options[1:1] = ["-n", given.namespace]
    pod = _pod(api, given, source and (source if "/" in source else f"{namespace}/{source}"))
    terminal = ["-i", "-t"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    if options[:2] == ["policy", "try"] and (with_files := _with_files(options)) != options:
        options, terminal = with_files, ["-i"]
    argv = ["kubectl", *given.connection, "exec", *terminal, "-n", given.mesh, pod, "-c", "agent", "--", "meshagent", *options]
    try:
        os.execvp(argv[0], argv)  # noqa: S606  in place of this process
    except FileNotFoundError as error:
        raise NotFound("there is no kubectl in PATH, which runs the command in the agent's pod: install it") from error


def _parsed(command: click.Command, arguments: list[str]) -> dict[str, Any]:
    """What click makes of a command's arguments; nothing is run, and what is missing or wrong is left to the command itself."""
    return command.make_context(command.name, list(arguments), resilient_parsing=True).params


def _with_files(options: list[str]) -> list[str]:
    """`policy try` with the files of this machine on standard input: the pod does not have them."""
    sources = tuple(_parsed(policy.try_, options[2:]).get("sources") or ())
    if not sources:
        return options
    kept, left = [], list(options)
    while left:
        word = left.pop(0)
        if word in {"-f", "--filename"}:
            del left[:1]
        elif not (word.startswith("--filename=") or (word.startswith("-f") and word != "-f")):
            kept.append(word)
    with tempfile.TemporaryFile() as file:
        file.write("\n---\n".join(document.yaml for document in resources.documents(sources)).encode())
        file.seek(0)
        os.dup2(file.fileno(), 0)
    return [*kept, "-f", "-"]


def _agents(api: Api, given: Given) -> dict[str, str]:
    """The agents' pods that run, by node. Raises NotFound."""
    from agent.check.api import Refused, Unreachable  # noqa: PLC0415  as above
    from agent.check.cluster import AGENTS  # noqa: PLC0415

    try:
        pods = api.items(f"/api/v1/namespaces/{given.mesh}/pods", AGENTS)
    except (Refused, Unreachable) as error:
        raise NotFound(f"cannot find the agents' pods in namespace {given.mesh}: {error}") from error
    agents: dict[str, str] = {
        one["spec"].get("nodeName", ""): one["metadata"]["name"]
        for one in pods
        if one.get("status", {}).get("phase") == "Running" and "deletionTimestamp" not in one["metadata"]
    }
    if not agents:
        raise NotFound(
            f"no agent runs in namespace {given.mesh}: is the mesh installed elsewhere? give --mesh-namespace; 'kubectl meshagent check' says more"
        )
    return agents


def _pod(api: Api, given: Given, source: str) -> str:
    """The agent's pod on the node that is asked for, or on that of a workload, or the only one. Raises NotFound."""
    agents = _agents(api, given)
    node = given.node or (_node_of(api, source) if source else "")
    if node in agents:
        return agents[node]
    if given.node:
        raise NotFound(f"no agent runs on node {given.node}; there are agents on {', '.join(sorted(agents))}")
    if len(agents) == 1 or source:  # a trace of a workload that is no pod can be asked of any agent
        return agents[min(agents)]
    raise NotFound(f"which node? give --node with one of {', '.join(sorted(agents))}")


def _node_of(api: Api, workload: str) -> str:
    from agent.check.api import Refused, Unreachable  # noqa: PLC0415  as above

    namespace, _, name = workload.partition("/")
    try:
        return str(api.get(f"/api/v1/namespaces/{namespace}/pods/{name}")["spec"].get("nodeName", ""))
    except (Refused, Unreachable) as error:
        if isinstance(error, Refused) and error.code == 404:
            return ""
        raise NotFound(f"cannot find the node of {workload}: {error}") from error


if __name__ == "__main__":
    main()
