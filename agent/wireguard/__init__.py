"""WireGuard between nodes: one device for each node, whose peers are the other nodes, in a mesh whose controller says so. Used by the supervisor.

desired.py says from the model which peers there have to be, and which addresses each may use; device.py brings the kernel to that; part.py decides when, and
which workloads may be reached without a tunnel. Needs a kernel with WireGuard, and nothing else: without it HBONE stays in use.
"""
