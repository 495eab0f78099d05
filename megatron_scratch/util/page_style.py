"""How pages look."""

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#16202b;--muted:#5b6774;--line:#e1e6eb;--track:#eaeef2;--stay:#2f6fde;--gone:#dd7a1c;--code:#f1f4f7}
@media (prefers-color-scheme:dark){:root{--bg:#10151b;--card:#181f27;--ink:#e7edf3;--muted:#97a4b2;--line:#2a343f;--track:#232c36;
--stay:#5b95f5;--gone:#ee9a49;--code:#121920}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px 48px}
h1{font-size:2rem;line-height:1.15;margin:.1em 0 .2em;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:0 0 .3em}
h3{font-size:1rem;margin:1.3em 0 .3em}h4{margin:.4em 0 0;font-size:.85rem;color:var(--muted);font-weight:600}
p{margin:.2em 0 .8em}.muted,small{color:var(--muted)}.kicker{margin:0;color:var(--stay);font-weight:600;font-size:.85rem}
section,.tile{background:var(--card);border:1px solid var(--line);border-radius:12px}
section{padding:20px 22px;margin-top:18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px;margin-top:18px}
.tile{padding:14px 18px;display:flex;flex-direction:column}.tile b{font-size:1.75rem;line-height:1.3;font-weight:650}
.tile .muted{font-size:.88rem}
.value,.n,.tile b{font-variant-numeric:tabular-nums}
.bars .row{display:grid;grid-template-columns:minmax(130px,220px) 1fr minmax(96px,auto);gap:14px;
align-items:center;padding:4px 0}
.name{overflow-wrap:anywhere;line-height:1.3}.name small{display:block;font-size:.78rem}
.value{text-align:right;white-space:nowrap;font-size:.92rem;min-width:120px}
.track{display:flex;height:14px;border-radius:4px;overflow:hidden;background:var(--track)}
.track i{background:var(--stay);height:100%}.track i.gone{background:var(--gone)}
.key{display:inline-block;width:.75em;height:.75em;border-radius:2px;background:var(--gone);vertical-align:-.05em}
.scroll{overflow-x:auto;margin-top:10px}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;padding:6px 12px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--muted);font-weight:500;vertical-align:bottom}td{overflow-wrap:anywhere}td:first-child{min-width:8em}
th.n,td.n{text-align:right;white-space:nowrap;padding:6px 0 6px 12px}
tbody tr:last-child td{border-bottom:0}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.85em}code{overflow-wrap:anywhere}
details{border-top:1px solid var(--line)}details:first-child{border-top:0}section>details:only-child{border:0}
summary{cursor:pointer;padding:6px 0;list-style-position:inside}summary h2{display:inline}
summary:focus-visible{outline:2px solid var(--stay);outline-offset:2px;border-radius:4px}
figure{margin:6px 0 12px}figcaption{font-size:.8rem;color:var(--muted);overflow-wrap:anywhere}
pre{margin:4px 0 0;padding:10px 12px;background:var(--code);border:1px solid var(--line);border-radius:8px;white-space:pre-wrap;
overflow-wrap:anywhere;max-height:240px;overflow-y:auto}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:6px 32px}.pair>div{min-width:0}
.pair h3{margin-top:.2em}
footer{margin-top:26px;font-size:.88rem;overflow-wrap:anywhere}
@media (max-width:560px){main{padding:20px 12px 32px}section{padding:16px 14px}h1{font-size:1.55rem}
.bars .row{grid-template-columns:1fr auto;gap:2px 10px;padding:6px 0}
.track{grid-column:1/-1;grid-row:2}
.tiles{grid-template-columns:1fr 1fr;gap:10px}.tile{padding:10px 12px}.tile b{font-size:1.35rem}.value{min-width:0}}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
"""
