"use strict";
// Latent browser and downloads. Text from data reaches the page through textContent only.
(() => {
  const PAGE = 20, SHOWN = 3, LEVELS = 8;
  const SIDES = [["", "all"], ["tuned", "specific to tuned"], ["base", "specific to base"], ["shared", "shared (sample)"],
    ["nats", "not specific, by nats"]];
  const PARTS = 12, NONE = "uninterpretable";
  const SORTS = [
    ["nats in a category, most first", (l) => l.nats.length ? -Math.max(0, ...l.nats.map((x) => Math.abs(x ?? 0))) : -(l.delta_norm ?? -1)],
    ["Δ norm, most tuned first", (l) => -(l.delta_norm ?? -1)],
    ["Δ norm, most base first", (l) => l.delta_norm ?? 2],
    ["frequency", (l) => -(l.frequency ?? 0)],
    ["largest activation", (l) => -(l.max_activation ?? 0)],
    ["ν error, smallest first", (l) => Math.abs(l.nu_error ?? 99)],
    ["latent number", (l) => l.latent],
  ];
  const $ = (id) => document.getElementById(id);

  function el(tag, classes, ...children) {
    const node = document.createElement(tag);
    if (classes) node.className = classes;
    node.append(...children.filter((c) => c !== null));
    return node;
  }

  function svg(tag, attributes, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  async function decode(base64) {
    const raw = atob(base64.trim()), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  const short = (x, digits = 3) => x === null ? "–"
    : (Number.isInteger(x) ? x.toLocaleString("en") : String(Number(x.toPrecision(digits)))).replace("-", "−");
  const percent = (x) => x === null ? "–" : `${short(100 * x, 2)} %`;

  // to four decimals, as nats of one latent are small
  function signed(x) {
    const text = Math.abs(x).toFixed(4);
    return Number(text) === 0 ? text : (x < 0 ? "−" : "+") + text;
  }

  // `only`: the latents that a link chose, instead of the filters; `row`: the category of the verdict's row it is of
  let data, latents, found = [], page = 0, only = null, row = null, chosen = "";

  function ofCategory(l) { return data.names[l.category] || "unlabelled"; }

  function haystack(l) {
    // built at the first search: 2,000 cards are 3 MB of text
    l.text ??= [l.label, ofCategory(l), l.latent, ...l.top_tokens.map((t) => data.vocabulary[t]),
      ...l.examples.map((e) => e[6].map((t) => data.vocabulary[t]).join(""))].join("\n").toLowerCase();
    return l.text;
  }

  function options(select, pairs) {
    select.replaceChildren(...pairs.map(([value, words]) => {
      const option = el("option", "", words);
      option.value = value;
      return option;
    }));
  }

  function gauge(delta) {
    const x = 4 + 112 * (delta ?? 0);
    const mark = delta === null ? [] : [svg("path", { class: "needle", d: `M${x} 2v12` })];
    return svg("svg", { class: "gauge", viewBox: "0 0 120 16", role: "img",
      "aria-label": `delta norm ${short(delta)}, 0 is only base, 1 is only tuned` },
    svg("path", { class: "axis", d: "M4 8H116M4 5v6M60 6v4M116 5v6" }), ...mark);
  }

  function readout(p, output, tokens, i) {
    for (const t of tokens) t.classList.toggle("cur", t === tokens[i]);
    output.textContent = i < 0 ? "" : `${tokens[i].textContent.trim() || "␣"} ${tokens[i].dataset.value}`;
    p.dataset.at = i;
  }

  function example(l, e) {
    const [document_, position, dataset, category, activation, peak, ids, sparse] = e;
    const values = new Map();
    for (let i = 0; i < sparse.length; i += 2) values.set(sparse[i], sparse[i + 1]);
    const top = Math.max(...values.values(), 1e-9);
    const p = el("p", "context"), live = [];
    p.tabIndex = 0;
    p.setAttribute("role", "group");
    p.setAttribute("aria-label", `context in document ${document_}, strongest activation ${short(activation)}`);
    ids.forEach((id, i) => {
      const value = values.get(i) ?? 0, text = data.vocabulary[id];
      if (value === 0 && i !== peak) {
        p.append(text);
      } else {
        const level = Math.max(1, Math.ceil(LEVELS * Math.min(1, Math.abs(value) / top)));
        const t = el("span", `t h${level}${i === peak ? " peak" : ""}`, text);
        t.dataset.value = short(value);
        live.push(t);
        p.append(t);
      }
      if (text.includes("↵")) p.append(document.createElement("wbr"));
    });
    const output = el("output", "value");
    p.addEventListener("pointerover", (event) => readout(p, output, live, live.indexOf(event.target)));
    p.addEventListener("focus", () => readout(p, output, live, live.findIndex((t) => t.classList.contains("peak"))));
    p.addEventListener("blur", () => readout(p, output, live, -1));
    p.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !live.length) return;
      event.preventDefault();
      readout(p, output, live, (Number(p.dataset.at ?? -1) + step + live.length) % live.length);
    });
    const where = [short(activation), data.names[category], data.names[dataset], `document ${document_}`, `token ${position}`];
    return el("div", "example", p, el("p", "meta", where.filter(Boolean).join(" · "), " ", output));
  }

  function measure(name, value) { return el("div", "", el("dt", "", name), el("dd", "", value)); }

  function nats(l) {
    const parts = l.nats.map((x, i) => [data.names[data.natsOf[l.run][i]], x]).filter((part) => part[1] !== null)
      .sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
    if (!parts.length) return null;
    const p = el("p", "nats", el("span", "meta", "Nats per token "));
    parts.forEach(([name, x], i) => {
      if (i < PARTS || name === row) p.append(el("span", name === row ? "part own" : "part", `${name} ${signed(x)}`), " ");
    });
    if (parts.length > PARTS) p.append(el("span", "meta", `${parts.length} categories in all`));
    return p;
  }

  function card(l) {
    const side = { shared: "shared", nats: "not specific" }[l.why] ?? `specific to ${l.why}`;
    const link = el("a", "number", `Latent ${l.latent}`);
    link.href = fragment(l);
    const title = el("h3", "", link, " ", el("span", `side ${l.why}`, `${{ tuned: "●", base: "◇" }[l.why] ?? "○"} ${side}`));
    if (data.runs.length > 1) title.append(" ", el("span", "side", data.runs[l.run]));
    const sure = ofCategory(l) === NONE ? "no one category stands out"
      : `${ofCategory(l)}${l.confidence === null ? "" : `, confidence ${short(l.confidence, 2)}`}`;
    const head = el("div", "head", title,
      el("p", "label", l.label || "unlabelled"),
      l.label ? el("p", "meta", `${sure}${l.annotator ? `, by ${l.annotator}` : ""}`) : null);
    if (l.top_tokens.length) {
      const chips = el("p", "tops", el("span", "meta", "Top tokens "));
      for (const t of l.top_tokens) chips.append(el("code", "", data.vocabulary[t].replace(/^ +| +$/g, (s) => "␣".repeat(s.length))), " ");
      head.append(chips);
    }
    const carried = nats(l);
    if (carried) head.append(carried);
    const numbers = el("dl", "numbers",
      el("div", "", el("dt", "", "Δ norm"), el("dd", "", short(l.delta_norm), el("span", "scale", "base ", gauge(l.delta_norm), " tuned"))),
      measure("ν error", short(l.nu_error)), measure("ν reconstruction", short(l.nu_reconstruction)),
      measure("cosine", short(l.cosine)), measure("class", l.class.replace("_", " ")),
      measure("frequency", percent(l.frequency)), measure("fires on", `${short(l.count)} tokens`),
      measure("largest", short(l.max_activation)),
      measure("norms", `${short(l.norm_base)}, ${short(l.norm_tuned)}`),
      l.stability === null ? null : measure("in other seeds", percent(l.stability)));
    const box = el("article", `card ${l.why}`, el("div", "side-by", head, numbers));
    l.examples.slice(0, SHOWN).forEach((e) => box.append(example(l, e)));
    if (l.examples.length > SHOWN) {
      const more = el("button", "more", `${l.examples.length - SHOWN} more contexts`);
      more.type = "button";
      more.addEventListener("click", () => {
        const rest = l.examples.slice(SHOWN).map((e) => example(l, e));
        more.replaceWith(...rest);
        rest[0].firstChild.focus();
      });
      box.append(more);
    }
    if (!l.examples.length) box.append(el("p", "meta", "No contexts were kept."));
    return box;
  }

  function fragment(l) {
    const run = data.runs.length > 1 ? `&run=${encodeURIComponent(data.runs[l.run])}` : "";
    return `#latent=${l.latent}${run}`;
  }

  function show() {
    const run = $("f-run").value, side = $("f-side").value, category = $("f-category").value;
    const words = $("f-search").value.trim().toLowerCase();
    found = only ?? latents.filter((l) => (run === "" || l.run === Number(run)) && (side === "" || l.why === side)
      && (category === "" || ofCategory(l) === category) && (words === "" || haystack(l).includes(words)));
    if (!only) {
      const key = SORTS[Number($("f-sort").value)][1];
      found = found.map((l) => [key(l), l]).sort((a, b) => a[0] - b[0]).map((pair) => pair[1]);
    }
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.max(0, Math.min(page, pages - 1));
    const first = page * PAGE, shown = found.slice(first, first + PAGE);
    $("cards").replaceChildren(...shown.map(card));
    $("count").textContent = only && !found.length ? "This report has no card for that. Reset shows all."
      : only ? `${chosen} Reset shows all ${short(latents.length)}.`
        : found.length === latents.length ? `${short(found.length)} latents`
          : `${short(found.length)} of ${short(latents.length)} latents`;
    $("pages").hidden = pages === 1;
    $("p-where").textContent = `${first + 1}–${first + shown.length} of ${short(found.length)}`;
    $("p-previous").disabled = page === 0;
    $("p-next").disabled = page === pages - 1;
  }

  function fresh() {
    only = row = null;
    page = 0;
    if (/^#(latent|row)=/.test(location.hash)) history.replaceState(null, "", "#latents");
    show();
  }

  function follow() {
    if (!/^#(latent|row)=/.test(location.hash)) return;
    // a plus is a plus: names are percent-encoded
    const wanted = new URLSearchParams(location.hash.slice(1).replaceAll("+", "%2B")), run = wanted.get("run");
    const isOf = (i) => run === null || data.runs[i] === run;
    row = wanted.get("row");
    if (row === null) {
      only = latents.filter((l) => l.latent === Number(wanted.get("latent")) && isOf(l.run));
      chosen = only.length ? `Latent ${only[0].latent} alone.` : "";
    } else {
      only = data.rows.flatMap((rows, i) => rows.filter((r) => isOf(i) && data.names[r[0]] === row)
        .flatMap((r) => r[1].map((latent) => latents.find((l) => l.run === i && l.latent === latent))))
        .filter((l) => l !== undefined);
      chosen = `${short(only.length)} latents with most nats in ${row}, most first.`;
    }
    page = 0;
    show();
    $("latents").scrollIntoView();
  }

  function choose(category, run) {
    for (const id of ["f-side", "f-search"]) $(id).value = "";
    if (![...$("f-category").options].some((o) => o.value === category)) {
      const option = el("option", "", `${category} (0)`);
      option.value = category;
      $("f-category").append(option);
    }
    $("f-category").value = category;
    $("f-run").value = run ?? "";
    fresh();
    $("latents").scrollIntoView();
    $("f-category").focus({ preventScroll: true });
  }

  async function download(name) {
    const island = [...document.querySelectorAll("script[data-name]")].find((s) => s.dataset.name === name);
    const type = name.endsWith(".csv") ? "text/csv" : "application/json";
    const a = el("a");
    a.href = URL.createObjectURL(new Blob([await decode(island.textContent)], { type }));
    a.download = name;
    a.click();
    setTimeout(() => URL.revokeObjectURL(a.href), 10000);
  }

  async function start() {
    for (const button of document.querySelectorAll("button[data-file]")) {
      button.addEventListener("click", () => download(button.dataset.file));
    }
    data = JSON.parse(await decode($("island").textContent));
    latents = data.latents.map((row) => {
      const l = Object.create(null);
      data.fields.forEach((name, i) => { l[name] = row[i]; });
      return l;
    });
    options($("f-run"), [["", "all"], ...data.runs.map((name, i) => [String(i), name])]);
    $("f-run").parentNode.hidden = data.runs.length === 1;
    options($("f-side"), SIDES);
    const counts = new Map();
    for (const l of latents) counts.set(ofCategory(l), (counts.get(ofCategory(l)) ?? 0) + 1);
    options($("f-category"), [["", "all"], ...[...counts].sort((a, b) => b[1] - a[1]).map(([name, n]) => [name, `${name} (${n})`])]);
    options($("f-sort"), SORTS.map(([name], i) => [String(i), name]));
    const form = $("filters");
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", fresh);
    form.addEventListener("reset", () => setTimeout(fresh));
    for (const [id, step] of [["p-previous", -1], ["p-next", 1]]) {
      $(id).addEventListener("click", () => { page += step; show(); $("latents").scrollIntoView(); });
    }
    for (const button of document.querySelectorAll("button[data-category]")) {
      button.addEventListener("click", () => choose(button.dataset.category, button.dataset.run));
    }
    for (const mark of document.querySelectorAll(".mark.live")) {
      mark.addEventListener("click", () => {
        const l = latents.find((x) => x.run === Number(mark.dataset.run) && x.latent === Number(mark.dataset.latent));
        if (l) location.hash = fragment(l);
      });
    }
    addEventListener("hashchange", follow);
    // a link to what the address already says changes no hash
    document.addEventListener("click", (event) => {
      const a = event.target.closest("a");
      if (a && a.hash && a.hash === location.hash) follow();
    });
    show();
    follow();
    document.documentElement.dataset.ready = "1";
  }

  start();
})();
