"""The certificate authority of the mesh: who gets which identity, from whom, and who is still believed. Knows nothing of BPF or Envoy."""
