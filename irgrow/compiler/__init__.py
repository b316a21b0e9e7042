"""From a network to a program: `schedule` orders the work, `lower` chooses a kernel for each piece."""
