"""Sources, compilation to the workload model, the discovery stream and the CA. Knows nothing of BPF or Envoy."""
