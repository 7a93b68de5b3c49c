"""Names of the report files in a bundle, and the version of ``report.json``."""

REPORT = "report.json"
REPORT_PAGE = "report.html"
SCHEMA = 1
