"""What servers take, the commands that load an adapter there, and the files they want."""
