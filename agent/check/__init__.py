"""`meshagent check`: what stands in the way of the mesh on a node or in a cluster, before it is installed and after, and what to do about each thing.

Called by `agent.cli.check` only. Everything here looks and changes nothing; a check that cannot be made is a finding of its own, never a crash of the
others. machine.py: the kernel and the machine. neighbours.py: others at the same hooks. running.py: an agent that runs. cluster.py: Kubernetes.
"""
