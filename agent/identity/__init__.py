"""Keys, certificates and trust of this node and its workloads. Writes no private key to a disk, unless the operator says that it may."""
