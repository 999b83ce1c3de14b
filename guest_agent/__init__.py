"""The agent: runs in the guest, outside the monitored container, and reads kernel memory by eBPF."""
