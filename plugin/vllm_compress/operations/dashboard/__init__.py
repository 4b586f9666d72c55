"""The dashboard: panels declared once, drawn by Grafana and by a page of our own."""
