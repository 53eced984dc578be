"""OCI registries as a remote: versions as artifacts of the CNCF ModelPack specification."""
