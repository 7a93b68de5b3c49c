"""Names of the reports in a bundle."""

REPORT = "report.json"
REPORT_PAGE = "report.html"
SCHEMA = 1
