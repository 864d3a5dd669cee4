"""Modules that trainers hold."""
