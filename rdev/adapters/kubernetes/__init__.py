"""The API server of Kubernetes: who we are there, objects, and the WebSockets of execs."""
