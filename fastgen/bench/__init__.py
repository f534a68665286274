"""What `fastgen bench` measures: workloads, engines that run them, the machine, parity."""
