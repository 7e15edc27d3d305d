"""Running commands in projects: the supervisor, the attach protocol, its transports."""
