"""The mesh and its logical axes, several hosts, preemption."""
