"""The style of ``report.html``."""

CSS = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #5c6579; --line: #dde1ea; --page: #f6f7fa; --card: #fff;
  --now: #3b5bdb; --before: #b4bccb; --bad: #d6336c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #9aa3b5; --line: #313848; --page: #14171f;
  --card: #1c212c; --now: #748ffc; --before: #566077; --bad: #f06595; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 28px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 0 0 8px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
h3 span { font-weight: 400; color: var(--soft); margin-left: 6px; }
p { margin: 0 0 10px; max-width: 74ch; }
header p, .note, small, section > p { color: var(--soft); }
.note { font-size: 13px; margin: 6px 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin-top: 16px; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin-top: 14px; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tiles b { display: block; font-size: 25px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; margin: 6px 0; }
th { text-align: left; color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line);
  padding: 4px 8px 4px 0; }
td { border-bottom: 1px solid var(--line); padding: 5px 8px 5px 0; vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.names, td small { color: var(--soft); font-size: 12.5px; overflow-wrap: anywhere; }
.captions { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 10px; }
figure { display: flex; gap: 12px; margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: 8px; }
figure img { width: 76px; height: 76px; object-fit: cover; border-radius: 6px; flex: none; }
figcaption { min-width: 0; overflow-wrap: anywhere; }
figcaption p { margin: 0; font-size: 13.5px; line-height: 1.35; }
figcaption small { display: block; font-size: 11.5px; }
.differs { border-color: var(--bad); }
.was { color: var(--soft); text-decoration: line-through; }
.is { color: var(--bad); }
.wide { overflow-x: auto; }
details { margin: 8px 0; }
summary { cursor: pointer; font-weight: 500; }
svg { display: block; max-width: none; overflow: visible; }
svg text { font: 12px system-ui, sans-serif; }
.now { fill: var(--now); } .before { fill: var(--before); } .bad { fill: var(--bad); }
.beyond { fill: var(--bad); fill-opacity: .14; }
.axis { fill: var(--soft); } .figure { fill: var(--ink); font-variant-numeric: tabular-nums; }
.limit { stroke: var(--bad); stroke-width: 1.5; } .axisline { stroke: var(--soft); stroke-dasharray: 3 3; }
"""
