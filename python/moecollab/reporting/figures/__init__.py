"""Figures of the page: pure functions from value types to Plotly figures."""
