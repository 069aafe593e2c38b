"""Kubernetes manifests, and what runs inside a pod."""
