import "uplot/dist/uPlot.min.css";
import "./style.css";
import { render } from "preact";
import { App } from "./app";
import { start } from "./store";
import { apply } from "./theme";

apply();
render(<App />, document.getElementById("app")!);
start();
