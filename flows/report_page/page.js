"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
  root.classList.add("js");

  // ---- storage, which a browser may refuse to a page that is a file
  const store = {
    get(key) { try { return sessionStorage.getItem("trivet-" + key); } catch { return null; } },
    set(key, value) { try { sessionStorage.setItem("trivet-" + key, value); } catch { /* kept for this view only */ } },
  };

  // ---- light and dark
  const themes = ["device", "light", "dark"];
  const button = document.getElementById("theme");
  const setTheme = (name) => {
    if (name === "device") delete root.dataset.theme; else root.dataset.theme = name;
    button.textContent = "theme: " + name;
    store.set("theme", name);
  };
  let theme = themes.includes(store.get("theme")) ? store.get("theme") : "device";
  const asked = new URLSearchParams(location.search).get("theme");
  if (themes.includes(asked)) theme = asked;
  setTheme(theme);
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    setTheme(theme);
  });

  // ---- runs and pages: #RUN/PAGE
  const runs = all("main.run");
  const choose = document.getElementById("run-switch");
  const show = () => {
    const [wantedRun, wantedPage] = decodeURIComponent(location.hash.slice(1)).split("/");
    const run = runs.find((one) => one.dataset.run === wantedRun) || runs[0];
    const pages = all(".page", run);
    const page = pages.find((one) => one.dataset.page === wantedPage) || pages[0];
    runs.forEach((one) => one.classList.toggle("shown", one === run));
    pages.forEach((one) => one.classList.toggle("shown", one === page));
    all(".pages a", run).forEach((link) => {
      if (link.dataset.to !== page.dataset.page) { link.removeAttribute("aria-current"); return; }
      link.setAttribute("aria-current", "page");
      link.parentElement.scrollLeft = link.offsetLeft - (root.clientWidth - link.offsetWidth) / 2;
    });
    if (choose) choose.value = run.dataset.run;
    tip.hidden = true;
  };
  const tip = document.getElementById("tip");
  if (choose) choose.addEventListener("change", () => {
    const current = location.hash.split("/")[1] || "overview";
    const target = runs.find((one) => one.dataset.run === choose.value);
    const known = all(".page", target).some((one) => one.dataset.page === current);
    location.hash = choose.value + "/" + (known ? current : "overview");
  });
  window.addEventListener("hashchange", () => { show(); window.scrollTo(0, 0); });
  show();

  // ---- samples: search, filter, order
  const STEP = 30;
  for (const page of all('.page[data-page="samples"]')) {
    const list = page.querySelector(".answers");
    if (!list) continue;
    const items = all("article", list);
    const [search, outcome, order, marks, found, more, none] = [".search", ".outcome", ".order", ".marks", ".found",
      ".more", ".none"].map((selector) => page.querySelector(selector));
    const key = "search-" + page.parentElement.dataset.run;
    const number = (item, name) => parseFloat(item.dataset[name]) || 0;
    const orders = {
      "": (a, b) => items.indexOf(a) - items.indexOf(b),
      best: (a, b) => number(b, "gap") - number(a, "gap"),
      worst: (a, b) => number(a, "gap") - number(b, "gap"),
      longest: (a, b) => number(b, "length") - number(a, "length"),
    };
    let limit = STEP;
    const update = () => {
      const words = search.value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
      const fits = items.filter((item) => words.every((word) => item.dataset.text.includes(word))
        && (!outcome.value || item.dataset.outcome === outcome.value));
      const chosen = new Set(fits);
      [...fits].sort(orders[order.value]).forEach((item, position) => {
        item.hidden = position >= limit;
        list.insertBefore(item, more);
      });
      items.forEach((item) => { if (!chosen.has(item)) item.hidden = true; });
      found.textContent = fits.length + " of " + items.length;
      more.hidden = fits.length <= limit;
      none.hidden = fits.length > 0;
      store.set(key, search.value);
    };
    const again = () => { limit = STEP; update(); };
    search.value = store.get(key) || "";
    search.addEventListener("input", again);
    outcome.addEventListener("change", again);
    order.addEventListener("change", again);
    marks.addEventListener("change", () => list.classList.toggle("marked", marks.checked));
    more.addEventListener("click", () => { limit += 100; update(); });
    update();
  }

  // ---- settings: search and filter
  for (const page of all('.page[data-page="settings"]')) {
    const search = page.querySelector(".search-settings");
    if (!search) continue;
    const only = page.querySelector(".chosen-only");
    const rows = all(".settings tbody tr", page);
    const update = () => {
      const wanted = search.value.toLocaleLowerCase().trim();
      rows.forEach((row) => {
        row.hidden = !row.dataset.text.includes(wanted) || (only !== null && only.checked && !("chosen" in row.dataset));
      });
    };
    search.addEventListener("input", update);
    if (only) only.addEventListener("change", update);
  }

  // ---- charts: values under the pointer
  const SVG = "http://www.w3.org/2000/svg";
  const text = (value) => {
    if (value === null) return "not finite";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
    return String(Number(value.toPrecision(size >= 1000 ? 6 : 4)));
  };
  const element = (name, attributes) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const line = (parts) => {
    const row = document.createElement("div");
    parts.forEach((part) => row.append(part));
    return row;
  };
  for (const plot of all(".plot")) {
    const chart = JSON.parse(plot.dataset.chart);
    const [left, right, top, bottom] = chart.box;
    const [first, last, low, high] = chart.range;
    const along = (step) => (chart.log ? Math.log(step) : step);
    const x = (step) => left + (right - left) * (along(step) - along(first)) / ((along(last) - along(first)) || 1);
    const y = (value) => bottom - (bottom - top) * (value - low) / (high - low);
    const overlay = element("g", { "class": "overlay" });
    plot.append(overlay);
    const leave = () => { overlay.replaceChildren(); tip.hidden = true; };
    const dot = (name) => { const made = document.createElement("i"); made.className = "c" + name; return made; };
    const move = (event) => {
      const place = plot.getBoundingClientRect();
      const scale = plot.viewBox.baseVal.width / place.width;
      const [px, py] = [(event.clientX - place.left) * scale, (event.clientY - place.top) * scale];
      const near = [];
      for (const one of chart.lines) {
        let best = null;
        for (const [step, value] of one.points) {
          const away = chart.nearest === "point" && value !== null
            ? Math.hypot(x(step) - px, y(value) - py) : Math.abs(x(step) - px);
          if (best === null || away < best.away) best = { away, step, value, one };
        }
        if (best) near.push(best);
      }
      if (!near.length) return;
      const closest = near.reduce((a, b) => (b.away < a.away ? b : a));
      const shown = chart.nearest === "point" ? [closest] : near.filter((one) => one.step === closest.step);
      overlay.replaceChildren();
      if (chart.nearest === "step") {
        overlay.append(element("line", { "class": "rule", x1: x(closest.step), x2: x(closest.step), y1: top, y2: bottom }));
      }
      const at = line([(chart.x || "at") + " " + text(closest.step)]);
      at.className = "at";
      tip.replaceChildren(at);
      for (const { step, value, one } of shown) {
        if (value !== null) overlay.append(element("circle", { "class": "spot c" + one.colour, cx: x(step), cy: y(value), r: 4 }));
        tip.append(line([dot(one.colour), one.name + " " + text(value)]));
      }
      tip.hidden = false;
      const wide = tip.offsetWidth;
      const middle = place.left + x(closest.step) / scale;
      const beside = middle + 14 + wide > root.clientWidth ? middle - 14 - wide : middle + 14;
      tip.style.left = Math.max(6, beside + window.scrollX) + "px";
      tip.style.top = place.top + window.scrollY + 24 + "px";
    };
    plot.addEventListener("pointermove", move);
    plot.addEventListener("pointerdown", move);
    plot.addEventListener("pointerleave", leave);
  }

  // ---- a run that is going: look again, unless somebody is reading on
  if ("going" in document.body.dataset) {
    setInterval(() => { if (!document.hidden && tip.hidden && window.scrollY < 400) location.reload(); }, 30000);
  }
})();
