// Bundles the page into ../static and notes there what it was made from; tests/console holds the two together.
import { createHash } from "node:crypto";
import { copyFileSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { join, relative, sep } from "node:path";
import { build } from "esbuild";

const here = import.meta.dirname;
const target = join(here, "..", "static");
const built = ["app.css", "app.js", "icon.svg", "index.html"];

await build({
  entryPoints: { app: join(here, "src", "main.tsx") },
  outdir: target,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "inline",
});
for (const name of ["index.html", "icon.svg"]) copyFileSync(join(here, name), join(target, name));

const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");
const files = (folder) =>
  readdirSync(folder, { withFileTypes: true }).flatMap((entry) => {
    if (entry.name === "node_modules") return [];
    const path = join(folder, entry.name);
    return entry.isDirectory() ? files(path) : [path];
  });
const names = files(here)
  .map((path) => relative(here, path).split(sep).join("/"))
  .sort();
const sources = sha256(names.map((name) => `${name} ${sha256(readFileSync(join(here, name)))}\n`).join(""));
const made = Object.fromEntries(built.map((name) => [name, sha256(readFileSync(join(target, name)))]));
writeFileSync(join(target, "build.json"), JSON.stringify({ sources, built: made }, null, 2) + "\n");
