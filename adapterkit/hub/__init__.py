"""The Hub as the registry's remote: `push` publishes a version in one commit, `pull` brings one and checks every byte."""
