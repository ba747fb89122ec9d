"""Measurements that back the claims, and the scenarios they run on."""
