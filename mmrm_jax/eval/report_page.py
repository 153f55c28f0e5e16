"""The report's page: its HTML frame and its style sheet."""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main><header><h1>{title}</h1>{headline}</header>
{body}
</main></body></html>
"""

STYLE = """
:root { color-scheme: light; --ink: #1d2733; --muted: #66717e; --line: #e3e7ec; --soft: #f6f8fa;
  --accent: #1d4f91; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 24px 18px 64px; }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--accent); margin: 0 0 12px; }
h2 { font-size: 1.35rem; margin: 0 0 6px; }
h3 { font-size: 1.05rem; margin: 28px 0 10px; }
section { border-top: 1px solid var(--line); margin-top: 36px; padding-top: 26px; }
.headline { font-size: clamp(1.35rem, 3.6vw, 2.1rem); line-height: 1.25; font-weight: 650; margin: 0 0 14px;
  max-width: 32em; }
.sub { font-size: 1.08rem; max-width: 46em; margin: 0; }
.lead { color: var(--muted); max-width: 46em; margin: 0 0 16px; }
.lead:empty { display: none; }
.muted, .empty { color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: .85rem; color: var(--muted); vertical-align: bottom; }
thead th { border-bottom: 2px solid var(--line); }
th, td { padding: 7px 18px 7px 0; }
tbody td { border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
td small { display: block; color: var(--muted); font-size: .75rem; }
.value { font-weight: 600; }
.grid { display: grid; gap: 18px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr));
  align-items: start; }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); margin: 18px 0; }
.wrap td { white-space: normal; overflow-wrap: anywhere; }
figure { margin: 0; } figure img { width: 100%; height: auto; }
figcaption { font-weight: 600; margin-bottom: 4px; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: 14px; background: #fff; overflow: hidden; }
.card p { margin: 8px 0 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.card.highest { border-top: 4px solid #c2410c; } .card.lowest { border-top: 4px solid #7c93ad; }
.card img { display: block; margin: 0 auto; max-width: 100%; max-height: 260px; border-radius: 6px; }
.card img.tiny { width: 160px; height: 160px; object-fit: contain; image-rendering: pixelated;
  background: var(--soft); }
.noimage { background: var(--soft); color: var(--muted); text-align: center; padding: 32px 8px; border-radius: 6px; }
.prompt { font-weight: 600; max-height: 9em; overflow: auto; }
.answer { padding: 7px 10px; border-radius: 6px; font-size: .93rem; max-height: 12em; overflow: auto; }
.answer b { display: block; font-size: .72rem; font-weight: 600; color: var(--muted); }
.good { background: #eaf5ee; } .bad { background: #fbeeee; }
.margins { display: flex; gap: 18px; font-variant-numeric: tabular-nums; }
.meaning { color: var(--muted); font-size: .88rem; }
pre { background: var(--soft); padding: 12px 14px; border-radius: 8px; overflow-x: auto; font-size: .88rem; }
summary { cursor: pointer; color: var(--accent); margin-bottom: 10px; }
"""
