"""Measurements that a user can repeat: `lockstep bench`."""
