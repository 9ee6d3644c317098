"""A mesh on one Linux machine: nodes and pods as network namespaces and cgroups. Used by the demo, the tests and the benchmarks."""
