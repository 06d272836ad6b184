"""The Ray Serve deployments and the builder that makes an application of a config."""
