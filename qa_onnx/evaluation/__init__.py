"""Predictions, the official metric, and where answers are wrong."""
