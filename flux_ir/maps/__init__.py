"""Where in the picture a word is looked at, and where it looks: attention maps from the kernel's own log-sum-exp."""
