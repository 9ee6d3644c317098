"""Names of services for enrolled workloads where there is no cluster DNS: one dnsmasq for each namespace, whose queries the kernel leads to it.

`records` says what is answered, `dnsmasq` runs one process, `service` is the part that the supervisor owns.
"""
