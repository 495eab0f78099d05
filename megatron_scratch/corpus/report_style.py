"""How the corpus report looks, beyond what all pages share."""

STYLE = """
.drops summary{display:grid;grid-template-columns:minmax(130px,220px) 1fr minmax(96px,auto);gap:14px;
align-items:center;padding:4px 0}
.pair .bars .row{grid-template-columns:136px 1fr 60px}.pair .value{min-width:0}
.pair .bars .name{white-space:nowrap}
.drops summary{list-style:none}.drops summary::-webkit-details-marker{display:none}
.drops .name::before{content:"▸ ";color:var(--muted)}.drops details[open] .name::before{content:"▾ "}
.chips code{display:inline-block;background:var(--code);border:1px solid var(--line);border-radius:6px;padding:1px 7px;
margin:2px;white-space:pre}
.chart{position:relative;margin-top:18px;padding-left:3.2em}
.chart svg{display:block;width:100%;height:180px;border-bottom:1px solid var(--muted)}.chart rect{fill:var(--stay)}
.chart .top{position:absolute;left:0;top:-.6em;width:2.8em;text-align:right;font-size:.8rem;color:var(--muted)}
.axis{display:flex;justify-content:space-between;font-size:.8rem;color:var(--muted);margin-top:4px}
.axis,.top{font-variant-numeric:tabular-nums}
@media (max-width:560px){.pair .bars .row,.drops summary{grid-template-columns:1fr auto;gap:2px 10px;padding:6px 0}}
"""
